import io
import os
from contextlib import suppress

import numpy as np
import pytest
from formats import png_header
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmfa.data.images import MAX_PIXELS, load_image, resolve_image, unsafe_path
from fmfa.errors import ImageError


def noise(height=40, width=16):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, image_format, **options)
    return buffer.getvalue()


def save(image, path, **options):
    image.save(path, **options)
    return np.asarray(load_image(path))


def test_lossless_pixels_arrive_unchanged(tmp_path):
    loaded = save(Image.fromarray(noise()), tmp_path / "a.png")
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, noise())


def test_palette_becomes_its_colours(tmp_path):
    image = Image.new("P", (4, 6), 3)
    image.putpalette([0, 0, 0, 9, 9, 9, 8, 8, 8, 250, 100, 20])
    assert (save(image, tmp_path / "a.png") == [250, 100, 20]).all()


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (3, 5), (200, 0, 0, 0)), {}),
        (Image.new("LA", (3, 5), (7, 0)), {}),
        (Image.new("P", (3, 5), 0), {"transparency": 0}),
    ],
    ids=["RGBA", "LA", "P"],
)
def test_transparent_is_white(tmp_path, image, options):
    assert (save(image, tmp_path / "a.png", **options) == 255).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    pixels = save(Image.new("RGBA", (3, 5), (0, 0, 0, 128)), tmp_path / "a.png")
    assert abs(int(pixels[0, 0, 0]) - 127) <= 1


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    grey = (np.arange(240, dtype=np.uint16) * 273).reshape(20, 12)
    loaded = save(Image.fromarray(grey), tmp_path / "a.png")
    np.testing.assert_array_equal(loaded, np.repeat((grey // 256)[..., None], 3, axis=2))


def test_cmyk_becomes_rgb(tmp_path):
    flat = Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK")
    loaded = save(flat, tmp_path / "a.jpg", quality=95)
    assert np.abs(loaded.astype(int) - [200, 60, 30]).max() < 6


def test_exif_orientation_turns_the_picture_upright(tmp_path):
    image = Image.fromarray(noise(40, 16))
    exif = image.getexif()
    exif[0x0112] = 6  # Shown after a quarter turn clockwise.
    loaded = save(image, tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(loaded, np.rot90(noise(40, 16), -1))


def test_first_frame_of_an_animation(tmp_path):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert (np.asarray(load_image(tmp_path / "a.gif")) == [255, 0, 0]).all()


def test_float_pixels_are_refused(tmp_path):
    Image.new("F", (3, 3), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=r"a\.tiff.*32-bit"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {})],
    ids=["png", "jpeg", "progressive", "webp", "bmp"],
)
def test_cut_files_are_errors_that_name_the_file(tmp_path, image_format, options, share):
    data = encoded(image_format, **options)
    file = tmp_path / "cut.img"
    file.write_bytes(data)
    load_image(file)
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.img"):
        load_image(file)


@pytest.mark.parametrize("kept", [0.6, 0.9, 0.99])
def test_a_jpeg_whose_end_is_zeros_is_an_error(tmp_path, kept):
    """Pillow decodes it without complaint, grey below the break."""
    data = encoded("JPEG")
    cut = int(len(data) * kept)
    (tmp_path / "a.jpg").write_bytes(data[:cut] + bytes(len(data) - cut))
    with pytest.raises(ImageError, match=r"a\.jpg"):
        load_image(tmp_path / "a.jpg")


JPEGS = [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"exif": b"Exif\0\0" + encoded("JPEG")}]


def movie(seed=0, length=3000):
    """Bytes as a motion photo has them behind its picture: they hold what looks like markers."""
    return b"\0\0\0\x18ftypmp42" + np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("options", JPEGS, ids=["baseline", "progressive", "restarts", "thumbnail"])
@pytest.mark.parametrize(
    "behind",
    [bytes(300), b"junk\xff\xd9junk\xff\xda", b"\xff\xda" + bytes(9), encoded("JPEG")[:300], movie(), movie() * 99],
    ids=["zeros", "markers", "scan", "cut picture", "movie", "long movie"],
)
def test_bytes_behind_a_jpeg_do_no_harm(tmp_path, options, behind):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", **options))
    alone = np.asarray(load_image(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", **options) + behind)
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg"), alone)


@pytest.mark.parametrize("options", JPEGS, ids=["baseline", "progressive", "restarts", "thumbnail"])
def test_bytes_behind_a_cut_jpeg_do_not_make_it_whole(tmp_path, options):
    data = encoded("JPEG", **options)
    for seed, share in enumerate(np.linspace(0.7, 0.99, 8)):
        for behind in (bytes(300), encoded("JPEG"), bytes(300) + encoded("JPEG"), movie(seed)):
            (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * share)] + behind)
            with pytest.raises(ImageError, match=r"a\.jpg"):
                load_image(tmp_path / "a.jpg")


def test_of_several_pictures_in_a_file_the_first_is_taken(tmp_path):
    first, second = Image.fromarray(noise()), Image.new("RGB", (16, 40), "red")
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second])
    first.save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(load_image(tmp_path / "a.mpo"), load_image(tmp_path / "a.jpg"))
    data = (tmp_path / "a.mpo").read_bytes()
    start = data.rindex(b"\xff\xd8\xff")
    (tmp_path / "a.mpo").write_bytes(data[: start + 200])  # the second is cut
    np.testing.assert_array_equal(load_image(tmp_path / "a.mpo"), load_image(tmp_path / "a.jpg"))
    (tmp_path / "a.mpo").write_bytes(data[: start - 200] + bytes(200) + data[start:])
    with pytest.raises(ImageError, match=r"a\.mpo"):
        load_image(tmp_path / "a.mpo")


@pytest.mark.parametrize("image_format", ["AVIF", "JPEG2000"])
def test_further_formats_of_pillow_are_read(tmp_path, image_format):
    (tmp_path / "a.img").write_bytes(encoded(image_format))
    assert load_image(tmp_path / "a.img").size == (16, 40)


def test_a_heic_picture_is_read_or_says_what_it_needs(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x20ftypheic")
    try:
        import pillow_heif
    except ImportError:
        with pytest.raises(ImageError, match=r"a\.heic: a HEIC picture.* pip install pillow-heif"):
            load_image(tmp_path / "a.heic")
    else:
        pillow_heif.from_pillow(Image.new("RGB", (16, 40), (200, 10, 10))).save(tmp_path / "a.heic")
        assert load_image(tmp_path / "a.heic").size == (16, 40)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 10_000), (MAX_PIXELS // 100, 101)])
def test_huge_pictures_are_refused_by_their_header(tmp_path, width, height, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    with pytest.raises(ImageError, match=r"bomb\.png"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore")
@given(
    data=st.binary(max_size=200),
    head=st.sampled_from(
        [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"P6 4 4 255 ", b"II*\x00"]
    ),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_load_or_raise_image_error(tmp_path_factory, data, head):
    file = tmp_path_factory.getbasetemp() / "bytes.img"
    file.write_bytes(head + data)
    with suppress(ImageError):
        assert load_image(file).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *[("empty.png", "empty"), ("none.png", "no such file"), ("sub", "folder"), ("t.png", "format")],
        *[("gone.png", "link"), ("loop.png", "link"), ("pipe.png", "pipe")],
    ],
)
def test_reasons_are_told(tmp_path, name, words):
    (tmp_path / "gone.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "t.png").write_text("not a picture")
    with pytest.raises(ImageError, match=words):
        load_image(tmp_path / name)


OUTSIDE = [
    "../a.png",
    "a/../../b.png",
    "/etc/a.png",
    "C:/a.png",
    "C:\\a.png",
    "\\a.png",
    "a\\..\\b.png",
    "a/..",
]
NAMELESS = ["", ".", "./", "a\0.png"]
INSIDE = ["a.png", "a/b.png", "a..b/c.png", "..a.png", "a/...b", "~a.png", "./a.png"]


@pytest.mark.parametrize("path", OUTSIDE + NAMELESS)
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    assert unsafe_path(path)
    with pytest.raises(ImageError, match="image path"):
        resolve_image(tmp_path, path)


@pytest.mark.parametrize("path", INSIDE)
def test_paths_inside_the_folder_are_joined(tmp_path, path):
    assert unsafe_path(path) is None
    assert resolve_image(tmp_path, path) == tmp_path / path


def test_links_of_the_user_are_followed_wherever_they_lead(tmp_path):
    imgs, other = tmp_path / "imgs", tmp_path / "other"
    imgs.mkdir()
    other.mkdir()
    Image.fromarray(noise()).save(other / "a.png")
    (imgs / "Market").symlink_to(other)
    (imgs / "one.png").symlink_to(other / "a.png")
    (tmp_path / "way").symlink_to(imgs)
    for folder in (imgs, tmp_path / "way"):
        for path in ("Market/a.png", "one.png"):
            assert load_image(resolve_image(folder, path)).size == (16, 40)

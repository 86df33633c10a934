import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmfa.errors import AnnotationError, ConfigError
from fmfa.models.objectives import objectives
from fmfa.training.batches import level_reader
from fmfa.training.config import METHODS, TrainConfig, preset_values

FIELDS = TrainConfig.__pydantic_fields__


def test_all_fields_are_plain_values_with_a_help_text():
    for name, setting in FIELDS.items():
        assert type(setting.default) in (str, int, float, bool), name
        assert setting.description, name


@pytest.mark.parametrize(("typo", "meant"), [("learning_rat", "learning_rate"), ("epoch", "epochs")])
def test_an_unknown_key_names_the_nearest(typo, meant):
    with pytest.raises(ConfigError, match=f"{typo}'; did you mean {meant}\\?"):
        TrainConfig.from_dict({typo: 1})


def test_a_key_like_nothing_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"known are method, preset"):
        TrainConfig.from_dict({"zzqx": 1})
    with pytest.raises(ConfigError, match="zzqx: unknown name"):
        TrainConfig(zzqx=1)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": "1e-5"},
        {"epochs": 3.0},
        {"epochs": True},
        {"tensorboard": 1},
        {"method": None},
        {"seed": "0"},
    ],
)
def test_a_value_of_another_type_is_refused(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name}: should be .*, found"):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": -2},
        {"learning_rate": -1e-5},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"weight_decay": -0.5},
        {"instances": -2},
        {"accumulate": 0},
        {"beta2": 1.0},
        {"seed": 2**40},
    ],
)
def test_a_value_outside_its_range_is_refused(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name}: should be .*, found"):
        TrainConfig(**values)


def test_a_wrong_choice_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^method: should be .*, found 'irrra'; did you mean irra\?"):
        TrainConfig(method="irrra")


def test_an_int_is_taken_for_a_float():
    assert TrainConfig(learning_rate=1).learning_rate == 1.0
    assert type(TrainConfig(learning_rate=1).learning_rate) is float


def test_a_config_survives_json():
    config = TrainConfig(method="ivt", learning_rate=3e-4, objectives="loss=sdm")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_objective_overrides_keep_their_types():
    config = TrainConfig(objectives="asdm_alpha=5, efa=0 efa_cost=released efa_lambda=0.5 padding=True")
    overrides = config.objective_overrides()
    assert overrides == {
        "asdm_alpha": 5,
        "efa": 0,
        "efa_cost": "released",
        "efa_lambda": 0.5,
        "padding": True,
    }
    assert type(overrides["asdm_alpha"]) is int
    assert TrainConfig().objective_overrides() == {}
    minus = "-" * 100_000  # more than Python's parser takes
    assert TrainConfig(objectives=f"efa={minus}1").objective_overrides() == {"efa": f"{minus}1"}


@pytest.mark.parametrize("text", ["asdm_alpha", "=5", "efa=", "efa=1 efa=2"])
def test_bad_objectives_are_refused(text):
    with pytest.raises(ConfigError, match="objectives"):
        TrainConfig(objectives=text).objective_overrides()


@pytest.mark.parametrize(
    ("method", "preset", "dataset", "expected"),
    [
        ("fmfa", "paper", "CUHK-PEDES", {"learning_rate": 1e-5, "factors": "irra", "epochs": 60}),
        ("fmfa", "paper", "ICFG-PEDES", {"epochs": 100}),
        ("fmfa", "released", "ICFG-PEDES", {"epochs": 60, "learning_rate": 5e-6, "factors": "flat"}),
        ("irra", "released", "RSTPReid", {"eps": 1e-3, "batch_size": 64, "learning_rate": 1e-5, "factors": "irra"}),
        ("irra", "released", "ICFG-PEDES", {"epochs": 60, "schedule": "warmup_cosine", "weight_decay": 4e-5}),
        ("clip", "released", "CUHK-PEDES", {"learning_rate": 1e-5, "factors": "irra", "eps": 1e-3}),
        ("clip", "paper", "RSTPReid", {"optimizer": "adam", "weight_decay": 4e-5, "image_height": 384}),
        ("ivt", "released", "CUHK-PEDES", {"optimizer": "sgd", "batch_size": 28, "schedule": "ivt_from_1"}),
        ("ivt", "released", "ICFG-PEDES", {"schedule": "ivt", "epochs": 120, "stride": 12}),
        ("ivt", "paper", "RSTPReid", {"batch_size": 48, "stride": 16, "schedule": "ivt"}),
        ("fmfa", "paper", "SimPEDES", {"image_height": 96, "image_width": 32, "stride": 8}),
    ],
)
def test_presets_are_the_published_recipes(method, preset, dataset, expected):
    resolved = TrainConfig(method=method, preset=preset, dataset=dataset).resolved().to_dict()
    assert {name: resolved[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("RSTPReid", ("rstpreid", "RSTP-Reid", "rstp")),
        ("ICFG-PEDES", ("icfg", "ICFG_PEDES")),
        ("CUHK-PEDES", ("cuhk", "cuhk_pedes")),
        ("SimPEDES-street", ("simpedes_street", "SimPEDES", "")),
    ],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_any_spelling_of_a_data_set_is_the_same_training(method, preset, name, spellings):
    expected = TrainConfig(method=method, preset=preset, dataset=name).resolved()
    assert expected.dataset == name
    for spelling in spellings:
        config = TrainConfig(method=method, preset=preset, dataset=spelling).resolved()
        assert config == expected
        if method != "ivt" and spelling:
            assert objectives(method, preset, spelling) == objectives(method, preset, name)
            assert preset_values(method, preset, spelling) == preset_values(method, preset, name)


def test_text_levels_follow_the_name_in_any_spelling():
    for spelling, form in (("cuhk", "attributes"), ("icfg", "clauses"), ("RSTP-Reid", "clauses")):
        assert level_reader(TrainConfig(method="ivt", dataset=spelling).resolved()).form == form


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("reid_raw.json", "CUHK-PEDES"), ("ICFG-PEDES.json", "ICFG-PEDES"), ("rstpreid_vistxt.json", "RSTPReid")],
)
def test_without_a_name_the_file_says_which_data_set_it_is(tmp_path, file_name, name):
    (tmp_path / file_name).write_text("[]")
    for method in METHODS:
        named = TrainConfig(method=method, dataset=name, root=str(tmp_path)).resolved()
        assert TrainConfig(method=method, root=str(tmp_path)).resolved() == named
    (tmp_path / file_name).rename(tmp_path / "mine.json")
    assert TrainConfig(root=str(tmp_path)).resolved().dataset == "mine"
    with pytest.raises(AnnotationError, match="no such file or folder"):
        TrainConfig(root=str(tmp_path / "none")).resolved()


@pytest.mark.parametrize(
    ("values", "reader"),
    [
        ({"method": "irra"}, "IRR"),
        ({"method": "fmfa"}, "IRR"),
        ({"method": "clip", "objectives": "irr=0.5"}, "IRR"),
        ({"method": "fmfa", "preset": "released", "objectives": "irr=0"}, "retrieval_sees_mask"),
    ],
)
def test_a_loss_over_masked_captions_needs_a_mask_rate(values, reader):
    with pytest.raises(ConfigError, match=f"mask_rate is 0, but {reader} reads masked captions"):
        TrainConfig(mask_rate=0, **values).resolved()
    for other in ({"method": "clip"}, {"method": "ivt"}, {"method": "irra", "objectives": "irr=0"}):
        assert TrainConfig(mask_rate=0, **other).resolved().mask_rate == 0


@pytest.mark.parametrize(("epochs", "expected"), [(-1, 60), (0, 0), (3, 3)])
def test_no_epochs_are_not_the_presets_epochs(epochs, expected):
    assert TrainConfig(dataset="CUHK-PEDES", epochs=epochs).resolved().epochs == expected


@pytest.mark.parametrize(("text", "grid"), [("", None), ("24x8", (24, 8)), (" 18 x 8 ", (18, 8))])
def test_a_position_grid_is_rows_and_columns(text, grid):
    assert TrainConfig(position_grid=text).grid == grid


@pytest.mark.parametrize("text", ["24", "0x8", "24x", "24x8x2", "-4x8", "24,8"])
def test_a_position_grid_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match="expected rows x columns, such as 24x8"):
        TrainConfig(position_grid=text)


def test_given_values_stand_against_the_preset():
    given_values = {"epochs": 2, "instances": 0, "weight_decay": 0.0, "mask_text": 0.0, "optimizer": "adamw"}
    resolved = TrainConfig(method="ivt", dataset="RSTPReid", **given_values).resolved()
    assert {name: getattr(resolved, name) for name in given_values} == given_values
    assert resolved.batch_size == 48


def test_a_batch_must_hold_whole_identities():
    with pytest.raises(ConfigError, match="not a multiple of instances 4"):
        TrainConfig(batch_size=30, instances=4).resolved()


@given(
    method=st.sampled_from(METHODS),
    preset=st.sampled_from(["paper", "released"]),
    dataset=st.sampled_from(["CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "SimPEDES", "my own"]),
)
def test_resolving_leaves_nothing_open_and_is_idempotent(method, preset, dataset):
    resolved = TrainConfig(method=method, preset=preset, dataset=dataset).resolved()
    assert resolved.resolved() == resolved
    for name in ("optimizer", "factors", "schedule", "text_levels"):
        assert getattr(resolved, name)
    for name in ("epochs", "batch_size", "learning_rate", "image_height", "image_width", "stride", "eps"):
        assert getattr(resolved, name) > 0
    for name in ("instances", "weight_decay", "warmup_epochs", "mask_image", "mask_text"):
        assert getattr(resolved, name) >= 0


def test_a_recipe_is_taken_over_by_the_other_system():
    names = ("optimizer", "factors", "schedule", "batch_size", "instances", "weight_decay", "warmup_epochs", "recipe")
    own = ("text_levels", "mask_image", "mask_text", "stride", "image_height")
    for dataset in ("SimPEDES-street", "CUHK-PEDES"):
        runs = {
            (method, recipe): TrainConfig(method=method, recipe=recipe, dataset=dataset).resolved().to_dict()
            for method in ("fmfa", "ivt")
            for recipe in ("", "fmfa", "ivt")
        }
        for method in ("fmfa", "ivt"):
            assert runs[method, ""] == runs[method, method if dataset == "CUHK-PEDES" else "fmfa"]
            for other in ("fmfa", "ivt"):
                assert all(runs[method, other][name] == runs[other, other][name] for name in names)
                assert all(runs[method, other][name] == runs[method, method][name] for name in own)
    assert runs["ivt", "fmfa"]["epochs"] == 60

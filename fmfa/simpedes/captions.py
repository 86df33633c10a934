"""What an annotator writes about a picture, and what the words truly say.

An annotator sees only what the camera shows: a part that covers too few pixels is not described. Each noun phrase
keeps its place in the caption, the part it speaks of, the attribute values its words allow, and its mistakes.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from fmfa.simpedes.camera import Rendering
from fmfa.simpedes.people import Person, pick
from fmfa.simpedes.words import (
    COLOUR_WORDS,
    CONFUSED_COLOURS,
    CONFUSED_TYPES,
    HAIR_WORDS,
    RARE,
    TYPE_WORDS,
    VAGUE,
    article,
)

# Fraction of the crop (96 x 32 pixels) below which a part is not noticed.
_NOTICED = {"hair": 0.005, "headwear": 0.004, "glasses": 0.0022, "scarf": 0.004, "top": 0.010, "outer": 0.02,
            "dress": 0.03, "lower": 0.025, "shoes": 0.0045, "bag": 0.007, "held": 0.003}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a domain's annotators write: chances of mentioning things, and of being vague or wrong."""

    mention: float  # main garments
    detail: float  # hair, shoes, bags and the like
    extra: float  # an added remark on pose or view
    vague: float
    mistake: float  # chance that a phrase tells something false
    long_forms: float  # chance of wordy constructions
    notes: bool = False  # key words in a fixed order, as in a report, instead of sentences


STYLES = {
    "street": Style(mention=0.95, detail=0.8, extra=0.35, vague=0.06, mistake=0.02, long_forms=0.25),
    "station": Style(mention=0.98, detail=0.93, extra=0.75, vague=0.04, mistake=0.02, long_forms=0.7),
    "night": Style(mention=0.95, detail=0.7, extra=0.4, vague=0.12, mistake=0.03, long_forms=0.0, notes=True),
}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase of a caption: characters [start, end), the part it speaks of ("person" for the whole)."""

    text: str
    part: str
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)  # attribute -> values the words allow
    mistakes: dict[str, str] = field(default_factory=dict)  # attribute -> the true value
    start: int = -1
    end: int = -1


@dataclass(frozen=True)
class Caption:
    """A caption and its phrases in order of appearance."""

    text: str
    phrases: tuple[Phrase, ...]


def describe(person: Person, picture: Rendering, style: Style, seed: list[int]) -> Caption:
    """Let one annotator describe one picture; `seed` fixes the annotator's choices."""
    annotator = _Annotator(person, picture, style, np.random.default_rng(seed))
    return annotator.write()


class _Annotator:
    def __init__(self, person: Person, picture: Rendering, style: Style, rng: np.random.Generator):
        self.p, self.picture, self.style, self.rng = person, picture, style, rng
        away = abs((picture.view.yaw + 180) % 360 - 180)  # 0 is a front view
        self.front, self.back = away < 55, away > 125
        self.pronoun, self.possessive = {"man": ("he", "his"), "woman": ("she", "her")}[person.gender]

    def _chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _one_of(self, *choices: str) -> str:
        return choices[int(self.rng.random() * len(choices))]

    def _sees(self, part: str) -> bool:
        return self.picture.visible[part] >= _NOTICED[part]

    def _word(self, lexicon: dict[str, set[str]], value: str) -> tuple[str, tuple[str, ...]]:
        """Choose a word that can mean `value`; return it with everything that it can mean."""
        vague = self.rng.random() < self.style.vague
        fitting = {w: 0.25 if w in RARE else 1.0 for w, means in lexicon.items() if value in means}
        of_kind = {w: weight for w, weight in fitting.items() if (w in VAGUE) == vague} or {
            w: weight for w, weight in fitting.items() if w not in VAGUE
        }
        exact = {w: weight * (2.5 if len(lexicon[w]) == 1 else 0.6) for w, weight in of_kind.items()}
        word = pick(self.rng, exact)
        return word, tuple(sorted(lexicon[word]))

    def _thing(self, part: str, kind: str, colour: str = "", pattern: bool = False) -> Phrase:
        """Name a garment or object: colour, pattern and type, now and then one of them wrongly."""
        told: dict[str, tuple[str, ...]] = {}
        mistakes: dict[str, str] = {}
        values = {kind: getattr(self.p, kind)}
        if colour:
            values[colour] = getattr(self.p, colour)
        if self._chance(self.style.mistake):
            wrong = colour if colour and self._chance(0.6) else kind
            confused = (CONFUSED_COLOURS if wrong == colour else CONFUSED_TYPES).get(values[wrong])
            if confused:
                mistakes[wrong], values[wrong] = values[wrong], confused
        words = []
        if colour:
            word, told[colour] = self._word(COLOUR_WORDS, values[colour])
            words.append(word)
        if pattern and self.p.top_pattern not in ("plain", "logo"):
            second, told["pattern_colour"] = self._word(COLOUR_WORDS, self.p.pattern_colour)
            look, told["top_pattern"] = self._word(TYPE_WORDS["top_pattern"], self.p.top_pattern)
            if second not in VAGUE and words and words[-1] not in VAGUE and self._chance(0.9):
                words += ["and", second]
            else:
                del told["pattern_colour"]
            words.append(look)
        word, told[kind] = self._word(TYPE_WORDS[kind], values[kind])
        words.append(word)
        if colour and len(words) == 2 and self._chance(0.06):  # the colour goes unsaid
            del told[colour], words[0]
        # A wide word, or none, can hide a mistake.
        mistakes = {name: truth for name, truth in mistakes.items() if truth not in told.get(name, (truth,))}
        return Phrase(" ".join(words), part, told, mistakes)

    def _subject(self) -> Phrase:
        word, genders = self._word(TYPE_WORDS["gender"], self.p.gender)
        told, text = {"gender": genders}, word
        if len(genders) > 1:
            self.pronoun, self.possessive = "the person", "their"
        if self.p.build != "average" and self._chance(0.45):
            build, told["build"] = self._word(TYPE_WORDS["build"], self.p.build)
            text = f"{build} {word}"
        return Phrase(text, "person", told)

    def _hair(self) -> Phrase | None:
        p, hat = self.p, self.p.headwear != "none"
        if p.hair_style == "bald":
            return None if hat else Phrase(self._one_of("shaved head", "bald head"), "hair", {"hair_style": ("bald",)})
        colour, values = self._word(HAIR_WORDS, p.hair_colour)
        told = {"hair_colour": values}
        style = p.hair_style
        unseen = (style == "ponytail" and self.front) or (hat and style in ("short", "bun"))
        if unseen or self._chance(0.2):
            return Phrase(f"{colour} hair", "hair", told)
        told["hair_style"] = (style,)
        forms = {
            "short": (f"short {colour} hair", f"{colour} short hair"),
            "long": (f"long {colour} hair", f"long, {colour} hair"),
            "shoulder": (f"shoulder-length {colour} hair", f"{colour} hair down to the shoulders"),
            "ponytail": (
                f"{colour} hair in a ponytail",
                f"{colour} ponytail",
                f"{colour} hair tied back in a ponytail",
            ),
            "bun": (f"{colour} hair in a bun", f"{colour} hair tied up in a bun"),
        }
        return Phrase(self._one_of(*forms[style]), "hair", told)

    def _worn(self) -> list[tuple[str, Phrase]]:
        """Main garments in a free order; a top under an open jacket needs a front view."""
        p, phrases = self.p, []
        main, detail = self.style.mention, self.style.detail
        over = p.outer != "none" and self._sees("outer")
        if over and self._chance(main):
            phrases.append(("", self._thing("outer", "outer", "outer_colour")))
        part = "dress" if p.top == "dress" else "top"
        if self._sees(part) and (not over or (self.front and self._chance(0.85))) and self._chance(main):
            joint = " over " if phrases and self._chance(0.5) else ""
            top = self._thing(part, "top", "top_colour", pattern=True)
            if p.top_pattern == "logo" and p.outer == "none" and self.front and p.held in ("none", "suitcase"):
                colour, values = self._word(COLOUR_WORDS, p.pattern_colour)
                if self._chance(0.7) and colour not in VAGUE:
                    what = self._one_of("logo", "print", "graphic")
                    logo = {"pattern_colour": values, "top_pattern": ("logo",)}
                    where = self._one_of("", " on the front")
                    top = replace(top, text=f"{top.text} with a {colour} {what}{where}", told={**top.told, **logo})
            phrases.append((joint, top))
        if p.lower != "none" and self._sees("lower") and self._chance(main):
            phrases.append(("", self._thing("lower", "lower", "lower_colour")))
        tail = [
            ("", self._thing(part, kind, colour))
            for part, kind, colour in (
                ("shoes", "shoes", "shoes_colour"),
                ("headwear", "headwear", "headwear_colour"),
            )
            if getattr(p, kind) != "none" and self._sees(part) and self._chance(detail)
        ]
        if p.scarf_colour != "none" and self._sees("scarf") and self._chance(detail):
            colour, values = self._word(COLOUR_WORDS, p.scarf_colour)
            tail.append(("", Phrase(f"{colour} scarf", "scarf", {"scarf_colour": values})))
        if p.glasses != "none" and self._sees("glasses") and self._chance(detail):
            tail.append(("", self._thing("glasses", "glasses")))
        if len(phrases) > 1 and not any(joint for joint, _ in phrases) and self._chance(0.25):
            phrases.reverse()
        return phrases + [tail[i] for i in self.rng.permutation(len(tail))]

    def _carried(self) -> list[tuple[str, Phrase, str]]:
        """Bags and held things: (verb, phrase, where)."""
        p, items = self.p, []
        if p.bag != "none" and self._sees("bag") and self._chance(self.style.detail + 0.1):
            phrase, where = self._thing("bag", "bag", "bag_colour"), ""
            said = phrase.told["bag"]
            if said == ("backpack",) and self._chance(0.4):
                where = f" on {self.possessive} back"
            if "backpack" not in said and p.bag == said[0] and self._chance(0.45):
                at = "in {} {} hand" if p.bag == "handbag" else "at {} {} side"
                where = " " + at.format(self.possessive, p.bag_side)
                phrase = replace(phrase, told={**phrase.told, "bag_side": (p.bag_side,)})
            items.append((self._one_of("carrying", "carrying", "with"), phrase, where))
        if p.held != "none" and self._sees("held") and self._chance(self.style.detail):
            phrase, where = self._thing("held", "held", "held_colour"), ""
            if self._chance(0.35):
                where = f" in {self.possessive} {p.held_side} hand"
                phrase = replace(phrase, told={**phrase.told, "held_side": (p.held_side,)})
            verb = "pulling" if phrase.told["held"] == ("suitcase",) else "holding"
            items.append((verb, phrase, where))
        return items

    def write(self) -> Caption:
        """Compose the caption."""
        text = _Text()
        subject = self._subject()
        hair = self._hair() if self._sees("hair") and self._chance(self.style.detail) else None
        worn, carried = self._worn(), self._carried()
        if self.style.notes:
            return self._notes(subject, hair, [phrase for _, phrase in worn], [phrase for _, phrase, _ in carried])
        later = worn[3:] if len(worn) > 3 and self._chance(0.6) else []
        first = worn[: len(worn) - len(later)]
        text.say(self._one_of("", "", "the ")).noun(subject, bare=text.length() > 0)
        if hair and self._chance(0.55):
            text.say(" with ").noun(hair)
            hair = None
        if self.style.long_forms > 0.5 and self._chance(0.4):
            text.say(self._one_of(", seen by the camera,", ", on foot,", ", walking through the hall,"))
        if first:
            text.say(self._one_of(" is wearing ", " wears ", " in ", " is dressed in "))
            text.listing([(joint, phrase, "") for joint, phrase in first])
        if carried and not later and self._chance(0.5):
            joint = self._one_of(", ", " and is ", ", ") if first else self._one_of(" is ", ", ")
            for k, (verb, phrase, where) in enumerate(carried):
                verb = "carrying" if verb == "with" and joint.endswith("is ") else verb
                text.say(" and " if k else joint).say(f"{verb} ").noun(phrase).say(where)
            carried = []
        text.stop()
        if later:
            wordy = self._chance(self.style.long_forms)
            text.say(f"{self.pronoun} also has on " if wordy else f"{self.pronoun} has ")
            text.listing([(joint, phrase, "") for joint, phrase in later])
            text.stop()
        if carried:
            text.say(f"{self.pronoun} is ")
            for k, (verb, phrase, where) in enumerate(carried):
                text.say(" and " if k else "").say("carrying " if verb == "with" else f"{verb} ")
                text.noun(phrase).say(where)
            text.stop()
        if hair:
            possessive = self._chance(0.4) and hair.told.get("hair_style") != ("bald",) and "ponytail" not in hair.text
            if possessive:
                text.say(f"{self.possessive} hair is ").noun(self._predicate(hair), bare=True)
            else:
                text.say(f"{self.pronoun} has ").noun(hair)
            text.stop()
        if self.p.beard == "beard" and self.front and self._sees("hair") and self._chance(0.5 * self.style.detail):
            text.say(f"{self.pronoun} has ").noun(Phrase("beard", "hair", {"beard": ("beard",)})).stop()
        if (self._chance(self.style.extra) and text.words() <= 31) or text.words() < 12:
            self._remark(text)
        if text.words() < 12:
            text.say(self._one_of("nothing else about the picture stands out", "the rest is hard to make out")).stop()
        return text.caption()

    def _notes(self, subject: Phrase, hair: Phrase | None, worn: list[Phrase], carried: list[Phrase]) -> Caption:
        text = _Text()
        for title, phrases in (("", [subject, hair]), ("wearing: ", worn), ("carrying: ", carried)):
            named = [phrase for phrase in phrases if phrase]
            for k, phrase in enumerate(named):
                text.say(", " if k else title).noun(phrase, bare=True)
            if named:
                text.stop()
        if self._chance(self.style.extra):
            text.say("view: " + ("front" if self.front else "back" if self.back else "side")).stop()
        return text.caption()

    def _predicate(self, hair: Phrase) -> Phrase:
        colour = next(w for w in hair.text.replace(",", "").split() if w in HAIR_WORDS)
        style = hair.told.get("hair_style", ("",))[0]
        lengths = {"short": "short and ", "long": "long and ", "shoulder": "shoulder-length and "}
        tail = " and tied up in a bun" if style == "bun" else ""
        return replace(hair, text=f"{lengths.get(style, '')}{colour}{tail}")

    def _remark(self, text: "_Text") -> None:
        stride = abs(self.picture.view.stride)
        if self.front:
            seen = ("walking towards the camera", "facing the camera", "seen from the front")
        elif self.back:
            seen = ("walking away from the camera", "seen from behind", "turned away from the camera")
        else:
            seen = ("seen from the side", "walking past the camera", "turned to the side")
        remark = self._one_of(*seen)
        if self.style.long_forms > 0.5:
            pace = "taking a long step" if stride > 14 else self._one_of("moving slowly", "in no hurry")
            text.say(f"{self.pronoun} is {remark}, {pace} ").say(
                self._one_of("through the hall", "on the platform", "along the passage", "across the floor")
            )
        else:
            text.say(f"{self.pronoun} is {remark}")
        text.stop()


class _Text:
    """Builds a caption piece by piece and remembers where each phrase is."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._phrases: list[Phrase] = []
        self._begins = True

    def length(self) -> int:
        return sum(map(len, self._pieces))

    def words(self) -> int:
        return len("".join(self._pieces).split())

    def say(self, words: str) -> "_Text":
        if words:
            if self._begins:
                words = words[0].upper() + words[1:]
                self._begins = False
            self._pieces.append(words)
        return self

    def noun(self, phrase: Phrase, bare: bool = False) -> "_Text":
        """Add a noun phrase, with its article unless `bare`; the span leaves the article out."""
        if not bare and not phrase.text.endswith("hair") and " hair " not in phrase.text:
            self.say(article(phrase.text))
        start = self.length()
        self.say(phrase.text)
        self._phrases.append(replace(phrase, start=start, end=self.length(), text=self._pieces[-1]))
        return self

    def listing(self, items: list[tuple[str, Phrase, str]]) -> "_Text":
        """Add "a, b and c"; an item's own joint (" over ") takes the place of the comma."""
        for k, (joint, phrase, _) in enumerate(items):
            if k:
                self.say(joint or (" and " if k == len(items) - 1 else ", "))
            self.noun(phrase)
        return self

    def stop(self) -> None:
        self._pieces.append(". ")
        self._begins = True

    def caption(self) -> Caption:
        return Caption("".join(self._pieces).rstrip(), tuple(self._phrases))

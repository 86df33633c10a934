"""The annotators' lexicon: each word with the attribute values that it can mean, and how often it is chosen."""

COLOUR_WORDS = {
    "black": {"black"}, "white": {"white"}, "grey": {"grey"}, "gray": {"grey"}, "red": {"red"},
    "bright red": {"red"}, "blue": {"blue", "navy", "light blue"}, "bright blue": {"blue"}, "royal blue": {"blue"},
    "navy": {"navy"}, "navy blue": {"navy"}, "dark blue": {"navy"}, "light blue": {"light blue"},
    "sky blue": {"light blue"}, "pale blue": {"light blue"}, "green": {"green", "dark green"},
    "bright green": {"green"}, "dark green": {"dark green"}, "forest green": {"dark green"}, "yellow": {"yellow"},
    "bright yellow": {"yellow"}, "orange": {"orange"}, "pink": {"pink"}, "light pink": {"pink"},
    "purple": {"purple"}, "violet": {"purple"}, "brown": {"brown"}, "dark brown": {"brown"}, "beige": {"beige"},
    "tan": {"beige"}, "cream": {"beige"},
    "dark": {"black", "navy", "brown", "dark green"},
    "dark-coloured": {"black", "navy", "brown", "dark green"},
    "light-coloured": {"white", "beige", "light blue", "pink"},
    "bright": {"red", "yellow", "orange", "pink"},
}  # fmt: skip
VAGUE = ("dark", "dark-coloured", "light-coloured", "bright")
RARE = ("gray", "bright red", "royal blue", "pale blue", "forest green", "violet", "cream", "dark brown", "light pink",
        "bright yellow", "bright green", "bright blue")  # fmt: skip
HAIR_WORDS = {
    "black": {"black"}, "dark": {"black", "brown"}, "brown": {"brown"}, "blond": {"blond"}, "blonde": {"blond"},
    "fair": {"blond"}, "red": {"red"}, "ginger": {"red"}, "grey": {"grey"}, "silver": {"grey"},
}  # fmt: skip
_TOPS = {"t-shirt", "shirt", "sweater", "hoodie", "tank top"}
TYPE_WORDS = {
    "top": {
        "t-shirt": {"t-shirt"}, "tee": {"t-shirt"}, "short-sleeved t-shirt": {"t-shirt"}, "button-up shirt": {"shirt"},
        "shirt": {"shirt", "t-shirt"}, "long-sleeved shirt": {"shirt"}, "sweater": {"sweater"}, "jumper": {"sweater"},
        "pullover": {"sweater"}, "hoodie": {"hoodie"}, "hooded sweatshirt": {"hoodie"}, "tank top": {"tank top"},
        "sleeveless top": {"tank top"}, "vest top": {"tank top"}, "top": _TOPS, "dress": {"dress"},
        "knee-length dress": {"dress"},
    },
    "outer": {
        "jacket": {"jacket"}, "open jacket": {"jacket"}, "coat": {"coat"}, "long coat": {"coat"}, "overcoat": {"coat"},
        "gilet": {"vest"}, "sleeveless jacket": {"vest"}, "body warmer": {"vest"},
    },
    "lower": {
        "jeans": {"jeans"}, "denim jeans": {"jeans"}, "trousers": {"trousers"}, "slacks": {"trousers"},
        "pants": {"trousers", "jeans"}, "shorts": {"shorts"}, "knee-length shorts": {"shorts"}, "skirt": {"skirt"},
        "knee-length skirt": {"skirt"},
    },
    "shoes": {
        "sneakers": {"sneakers"}, "trainers": {"sneakers"}, "sports shoes": {"sneakers"},
        "shoes": {"sneakers", "shoes"}, "leather shoes": {"shoes"}, "boots": {"boots"}, "high boots": {"boots"},
    },
    "bag": {
        "backpack": {"backpack"}, "rucksack": {"backpack"}, "shoulder bag": {"shoulder bag"},
        "messenger bag": {"shoulder bag"}, "crossbody bag": {"shoulder bag"}, "handbag": {"handbag"},
        "purse": {"handbag"}, "bag": {"backpack", "shoulder bag", "handbag"},
    },
    "held": {
        "phone": {"phone"}, "mobile phone": {"phone"}, "cell phone": {"phone"}, "cup": {"cup"}, "coffee cup": {"cup"},
        "drink": {"cup"}, "book": {"book"}, "notebook": {"book"}, "suitcase": {"suitcase"},
        "rolling suitcase": {"suitcase"},
    },
    "headwear": {
        "cap": {"cap"}, "baseball cap": {"cap"}, "beanie": {"beanie"}, "woolly hat": {"beanie"}, "knit cap": {"beanie"},
        "hat": {"hat", "beanie", "cap"}, "brimmed hat": {"hat"}, "sun hat": {"hat"},
    },
    "glasses": {
        "glasses": {"glasses"}, "eyeglasses": {"glasses"}, "spectacles": {"glasses"}, "sunglasses": {"sunglasses"},
        "dark glasses": {"sunglasses"}, "shades": {"sunglasses"},
    },
    "gender": {
        "man": {"man"}, "guy": {"man"}, "male": {"man"}, "gentleman": {"man"}, "woman": {"woman"}, "lady": {"woman"},
        "girl": {"woman"}, "female": {"woman"}, "person": {"man", "woman"}, "pedestrian": {"man", "woman"},
    },
    "build": {"slim": {"slim"}, "thin": {"slim"}, "skinny": {"slim"}, "heavy-set": {"heavy"}, "stocky": {"heavy"}},
    "top_pattern": {
        "striped": {"striped"}, "stripy": {"striped"}, "checked": {"checked"}, "plaid": {"checked"},
        "checkered": {"checked"}, "dotted": {"dotted"}, "polka-dot": {"dotted"}, "spotted": {"dotted"},
    },
}  # fmt: skip
PLURAL = ("jeans", "trousers", "slacks", "pants", "shorts", "sneakers", "trainers", "shoes", "boots", "glasses",
          "eyeglasses", "spectacles", "sunglasses", "shades")  # fmt: skip
# What people mix up: used for the small, recorded rate of mistakes.
CONFUSED_COLOURS = {
    "black": "navy", "white": "beige", "grey": "white", "red": "orange", "blue": "purple", "navy": "black",
    "light blue": "white", "green": "blue", "dark green": "black", "yellow": "orange", "orange": "red",
    "pink": "red", "purple": "pink", "brown": "black", "beige": "white",
}  # fmt: skip
CONFUSED_TYPES = {
    "t-shirt": "tank top", "shirt": "sweater", "sweater": "hoodie", "hoodie": "sweater", "tank top": "t-shirt",
    "jacket": "coat", "coat": "jacket", "vest": "jacket", "jeans": "trousers", "trousers": "jeans", "shorts": "skirt",
    "skirt": "shorts", "sneakers": "boots", "shoes": "boots", "boots": "shoes", "backpack": "shoulder bag",
    "shoulder bag": "handbag", "handbag": "shoulder bag", "phone": "book", "cup": "phone", "book": "phone",
    "cap": "beanie", "beanie": "cap", "hat": "cap", "glasses": "sunglasses", "sunglasses": "glasses",
}  # fmt: skip


def article(words: str) -> str:
    """Return the indefinite article of a noun phrase with a space behind it, nothing for a plural."""
    if words.rsplit(" ", 1)[-1] in PLURAL:
        return ""
    return "an " if words[0] in "aeiou" else "a "

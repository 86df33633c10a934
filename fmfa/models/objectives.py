"""Which losses a two-stream model is trained with: every row of the ablation is one `Objectives`."""

from dataclasses import dataclass, fields

from fmfa.data.annotations import SIMPEDES, canonical_name
from fmfa.errors import ConfigError
from fmfa.losses.efa import COSTS, KEEPS
from fmfa.losses.matching import ASDM_FORMS

METHODS = ("clip", "irra", "fmfa")
PRESETS = ("paper", "released")
POSITIONS = ("caption", "all")
LOSSES = ("itc", "cmpm", "sdm", "asdm", "id", "irr", "efa", "grounding")
# Yin et al. 2026: (text-to-joint, vision-to-joint) margins of EFA
PAPER_MARGINS = {"CUHK-PEDES": (0.1, 0.1), "ICFG-PEDES": (0.2, 1.0), "RSTPReid": (0.2, 0.8)}


@dataclass(frozen=True)
class Objectives:
    """Weights and forms of the losses. A part with weight 0 is switched off, with its head and its cost.

    Raises:
        ConfigError: a value of the wrong type or outside its range, or no loss at all.
    """

    itc: float = 0.0  # weight of the contrastive loss (InfoNCE)
    cmpm: float = 0.0  # weight of cross-modal projection matching
    sdm: float = 0.0  # weight of similarity distribution matching
    asdm: float = 0.0  # weight of adaptive similarity distribution matching
    id: float = 0.0  # weight of the identity classification
    irr: float = 0.0  # weight of implicit relation reasoning (masked tokens)
    efa: float = 0.0  # weight of explicit fine-grained alignment
    grounding: float = 0.0  # weight of token-to-patch supervision by true part maps, an oracle of SimPEDES
    tau: float = 0.02  # temperature of ITC, SDM and A-SDM; fixed, not learned
    asdm_form: str = "paper"  # gap of softmax probabilities, or of raw cosines ("released")
    asdm_alpha: float = 10.0  # strength of A-SDM's weights
    efa_cost: str = "paper"  # negatives only, or scaled rows with the diagonal kept ("released")
    efa_positions: str = "caption"  # text positions that count: "caption", or "all" with the padding
    efa_keep: str = ">="  # which weights survive the threshold
    efa_sigma: float = 0.0  # threshold after min-max; 0 = 1 / number of patches
    efa_lambda: float = 1.0  # sharpness of the log-sum-exp pooling
    efa_margin_text: float = 0.1  # margin of the text-to-joint cost
    efa_margin_image: float = 0.1  # margin of the vision-to-joint cost
    efa_chunk: int = 0  # rows of the batch compared at a time; 0 = chosen by size
    efa_oracle: bool = False  # phrase tokens group the patches of their true part, an oracle of SimPEDES
    grounding_tau: float = 0.07  # temperature of the token-to-patch supervision
    irr_depth: int = 4  # self-attention blocks of IRR
    irr_heads: int = 0  # attention heads of IRR; 0 = width / 64, at least 1
    irr_padding_mask: bool = False  # hide padding from IRR's self-attention (neither preset does)
    retrieval_sees_mask: bool = False  # the retrieval branch gets the masked caption, as in released code

    def __post_init__(self) -> None:
        """Check every field; whole numbers become floats where a float is expected."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not field.type:
                raise ConfigError(
                    f"objective {field.name} is {value!r} ({type(value).__name__}), expected {field.type.__name__}"
                )
        for name in (*LOSSES, "asdm_alpha", "efa_chunk", "irr_heads"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("tau", "efa_lambda", "grounding_tau", "irr_depth"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        self._require("efa_sigma", 0 <= self.efa_sigma < 1, "0 (for 1/N) or a threshold below 1")
        for name, choices in (
            ("asdm_form", ASDM_FORMS),
            ("efa_cost", COSTS),
            ("efa_positions", POSITIONS),
            ("efa_keep", KEEPS),
        ):
            self._require(name, getattr(self, name) in choices, "one of " + ", ".join(choices))

        if not any(getattr(self, name) for name in LOSSES):
            raise ConfigError(f"objectives {', '.join(LOSSES)} are all 0: nothing to train; give one of them a weight")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"objective {name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def needs_mask(self) -> bool:
        """Whether training reads the masked captions of a batch."""
        return self.irr > 0 or self.retrieval_sees_mask

    @property
    def needs_parts(self) -> bool:
        """Whether training reads true part maps, which only SimPEDES has."""
        return self.grounding > 0 or (self.efa > 0 and self.efa_oracle)

    @property
    def needs_all_positions(self) -> bool:
        """Whether padding positions of the retrieval branch take part in a loss."""
        return self.efa > 0 and self.efa_positions == "all"


def objectives(method: str, preset: str = "paper", dataset: str = "CUHK-PEDES", **overrides) -> Objectives:
    """The losses of a method as its paper or its released code has them, with single fields overridden.

    `clip` is ITC alone, `irra` SDM + ID + IRR, `fmfa` A-SDM + ID + IRR + EFA, each with weight 1. The
    data set decides FMFA's alpha and margins under `paper` (others than the three of the paper get those
    of CUHK-PEDES; on SimPEDES alpha is 1, because at 10 training collapses from the tiny start). `released`
    lets the retrieval branch of IRRA and FMFA see the masked caption; plain CLIP fine-tuning has no masked
    captions.

    Args:
        method: "clip", "irra" or "fmfa".
        preset: "paper" or "released".
        dataset: name of the data set, in any spelling.
        overrides: fields of `Objectives`.

    Returns:
        The resolved objectives.

    Raises:
        ConfigError: unknown method, preset or field, or a value that does not fit its field.
    """
    weights = {
        "clip": {"itc": 1.0},
        "irra": {"sdm": 1.0, "id": 1.0, "irr": 1.0},
        "fmfa": {"asdm": 1.0, "id": 1.0, "irr": 1.0, "efa": 1.0},
    }
    for name, value, choices in (("method", method, METHODS), ("preset", preset, PRESETS)):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    known = {field.name for field in fields(Objectives)}
    if unknown := sorted(set(overrides) - known):
        raise ConfigError(f"unknown objectives {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if preset == "paper":
        dataset = canonical_name(dataset)
        margin_text, margin_image = PAPER_MARGINS.get(dataset, PAPER_MARGINS["CUHK-PEDES"])
        forms = {
            "asdm_alpha": 1.0 if dataset == "RSTPReid" or dataset.startswith(SIMPEDES) else 10.0,
            "efa_margin_text": margin_text,
            "efa_margin_image": margin_image,
        }
    else:
        forms = {
            "asdm_form": "released",
            "asdm_alpha": 0.1,
            "efa_cost": "released",
            "efa_positions": "all",
            "efa_keep": ">",
            "efa_margin_text": 0.1,
            "efa_margin_image": 0.9,
            "retrieval_sees_mask": method != "clip",
        }
    return Objectives(**(weights[method] | forms | overrides))

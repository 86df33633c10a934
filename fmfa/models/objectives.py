"""Which losses a two-stream model is trained with: every row of the ablation is one `Objectives`."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from fmfa.data.annotations import SIMPEDES, canonical_name
from fmfa.errors import ConfigError, checked

METHODS = ("clip", "irra", "fmfa")
PRESETS = ("paper", "released")
LOSSES = ("itc", "cmpm", "sdm", "asdm", "id", "irr", "efa", "grounding")
# Yin et al. 2026: (text-to-joint, vision-to-joint) margins of EFA
PAPER_MARGINS = {"CUHK-PEDES": (0.1, 0.1), "ICFG-PEDES": (0.2, 1.0), "RSTPReid": (0.2, 0.8)}

Form = Literal["paper", "released"]
Cost = Literal["paper", "released", "literal"]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


@checked
class Objectives:
    """Weights and forms of the losses. A part with weight 0 is switched off, with its head and its cost.

    Raises:
        ConfigError: a value of the wrong type or outside its range, or no loss at all.
    """

    itc: NotNegative = 0.0  # weight of the contrastive loss (InfoNCE)
    cmpm: NotNegative = 0.0  # weight of cross-modal projection matching
    sdm: NotNegative = 0.0  # weight of similarity distribution matching
    asdm: NotNegative = 0.0  # weight of adaptive similarity distribution matching
    id: NotNegative = 0.0  # weight of the identity classification
    irr: NotNegative = 0.0  # weight of implicit relation reasoning (masked tokens)
    efa: NotNegative = 0.0  # weight of explicit fine-grained alignment
    grounding: NotNegative = 0.0  # weight of token-to-patch supervision by true part maps, an oracle of SimPEDES
    tau: Positive = 0.02  # temperature of ITC, SDM and A-SDM; fixed, not learned
    sdm_epsilon: Positive = 1e-8  # added to the targets of SDM and A-SDM
    asdm_form: Form = "paper"  # gap of softmax probabilities, or of raw cosines ("released")
    asdm_alpha: NotNegative = 10.0  # strength of A-SDM's weights
    asdm_offset: NotNegative = 1.0  # weight of a row without a gap, the "+1" of the paper's Eq. 2
    asdm_gradient: bool = True  # let the gradient flow through A-SDM's weights, as the code does; the paper is silent
    efa_cost: Cost = "paper"  # negatives only; scaled rows with the diagonal kept ("released"); one sum ("literal")
    efa_positions: Literal["caption", "all"] = "caption"  # text positions that count; "all" with the padding
    efa_keep: Literal[">=", ">"] = ">="  # which weights survive the threshold
    efa_sigma: Annotated[float, Field(ge=0, lt=1)] = 0.0  # threshold after min-max; 0 = 1 / number of patches
    efa_lambda: Positive = 1.0  # sharpness of the log-sum-exp pooling
    efa_margin_text: float = 0.1  # margin of the text-to-joint cost
    efa_margin_image: float = 0.1  # margin of the vision-to-joint cost
    efa_chunk: Count = 0  # rows of the batch compared at a time; 0 = chosen by size
    efa_oracle: bool = False  # phrase tokens group the patches of their true part, an oracle of SimPEDES
    grounding_tau: Positive = 0.07  # temperature of the token-to-patch supervision
    irr_depth: AtLeastOne = 4  # self-attention blocks of IRR
    irr_heads: Count = 0  # attention heads of IRR; 0 = width / 64, at least 1
    irr_padding_mask: bool = False  # hide padding from IRR's self-attention (neither preset does)
    retrieval_sees_mask: bool = False  # the retrieval branch gets the masked caption, as in released code

    def __post_init__(self) -> None:
        """Refuse to train nothing."""
        if not any(getattr(self, name) for name in LOSSES):
            raise ConfigError(f"objectives {', '.join(LOSSES)} are all 0: nothing to train; give one of them a weight")

    @property
    def asdm_weighting(self) -> dict[str, Any]:
        """How A-SDM weighs its rows, as `fmfa.losses.matching.asdm_weights` takes it."""
        form, offset = self.asdm_form, self.asdm_offset
        return {"scale": 1 / self.tau, "alpha": self.asdm_alpha, "form": form, "offset": offset}

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


def objectives(method: str, preset: str = "paper", dataset: str = "CUHK-PEDES", **overrides: Any) -> Objectives:
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
    forms: dict[str, Any]
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

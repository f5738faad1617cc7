"""What is merged with both tools, how near the results must be, and every difference that is meant.

mergekit computes `linear` and `slerp` in fp32 and all other methods in the dtype of the inputs; darwin
computes everything in fp32. So fp32 models are compared tightly, and bf16 models by what bf16 arithmetic
on differences of bf16 numbers loses.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Near:
    """How near the elements must be.

    Elements differ if they are further apart than `ulps` units in the last place of the largest number
    that goes into them.
    """

    ulps: float
    share: float = 0.0
    """Of each tensor's elements, this share may differ, and two more if it is not 0."""
    rms: float = 0.0
    """Root mean square of what differs, relative to that of the change from the base, over all tensors."""


@dataclass(frozen=True)
class Alike:
    """How near the averages over all tensors must be where the elements are drawn at random.

    The defaults are about five standard errors of the smallest model here, 33,000 elements.
    """

    kept: float = 0.05
    """Share of elements that change, for the elements of each quarter of the magnitudes in a row."""
    slope: float = 0.07
    """Regression of the change on the change that nothing dropped would make: the expected value."""
    norm: float = 0.05
    """Length of the change, relative to that of the change that nothing dropped would make."""


@dataclass(frozen=True)
class Refused:
    """A file that mergekit merges, silently or by a rule of its own, and that darwin refuses."""

    name: str
    config: str
    message: str
    """What darwin's error names."""


@dataclass(frozen=True)
class Case:
    """One merge, and how near both tools must be."""

    name: str
    config: str
    """A mergekit file, in which `m0` is the place of the base and `m1`, `m2`, `m3` those of relatives."""
    fp32: Near | Alike = Near(ulps=4)
    bf16: Near | Alike | None = Near(ulps=2, share=0.02, rms=0.005)
    """None: not compared."""
    whole: bool = False
    """Whether an element depends on its whole tensor. mergekit fuses the experts of a layer into one
    tensor and takes that as the whole; to darwin an expert's matrix is one. Experts are not compared."""
    difference: str = ""
    """What differs on purpose, in words."""
    fails_for: tuple[str, ...] = ()
    """Families for which mergekit fails; darwin's child must load then."""


FP32_INSIDE = Near(ulps=1)
"""bf16 models where mergekit computes in fp32 as well."""

THRESHOLD = (
    "darwin keeps at least `density` and at most one bin of 1/256 of an octave more, and equal "
    "magnitudes together; mergekit keeps floor(density * n), equal ones as its sort leaves them. "
)
BF16_SIGNS = "bf16: signs that tie in mergekit's bf16 sums do not in fp32. "
BF16_DELTAS = "bf16: mergekit ranks task vectors that were rounded to bf16. " + BF16_SIGNS
RANDOM = "The masks are drawn from other generators: averages are compared. "

LENGTHS = Near(ulps=16)
"""fp32 models where mergekit adds up squares over a whole tensor or row in fp32."""
LENGTHS_BF16 = Near(ulps=2, share=0.08, rms=0.005)

TRIMMED = Near(ulps=2, share=0.01, rms=0.08)
TRIMMED_BF16 = Near(ulps=2, share=0.05, rms=0.12)

CASES = (
    Case("linear", """
merge_method: linear
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
""", bf16=FP32_INSIDE),
    Case("linear_sum", """
merge_method: linear
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
  - {model: m3, parameters: {weight: 0.4}}
parameters: {normalize: false}
""", bf16=FP32_INSIDE),
    Case("slerp", """
merge_method: slerp
base_model: m1
models: [{model: m1}, {model: m2}]
parameters: {t: 0.3}
""", bf16=FP32_INSIDE, whole=True),
    Case("nuslerp", """
merge_method: nuslerp
models:
  - {model: m1, parameters: {weight: 0.6}}
  - {model: m2, parameters: {weight: 0.2}}
""", LENGTHS, LENGTHS_BF16, whole=True),
    Case("nuslerp_base", """
merge_method: nuslerp
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.6}}
  - {model: m2, parameters: {weight: 0.2}}
""", LENGTHS, LENGTHS_BF16, whole=True),
    Case("nuslerp_rows", """
merge_method: nuslerp
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.6}}
  - {model: m2, parameters: {weight: 0.2}}
parameters: {nuslerp_flatten: false}
""", LENGTHS, LENGTHS_BF16),
    Case("multislerp", """
merge_method: multislerp
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
  - {model: m3, parameters: {weight: 0.4}}
""", LENGTHS, LENGTHS_BF16, whole=True),
    Case("multislerp_base", """
merge_method: multislerp
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
  - {model: m3, parameters: {weight: 0.4}}
""", LENGTHS, LENGTHS_BF16, whole=True),
    Case("karcher", """
merge_method: karcher
models: [{model: m1}, {model: m2}, {model: m3}]
""", LENGTHS, LENGTHS_BF16, whole=True),
    Case("task_arithmetic", """
merge_method: task_arithmetic
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: -0.3}}
  - {model: m3, parameters: {weight: 0.4}}
parameters: {lambda: 0.7}
"""),
    Case("task_arithmetic_mean", """
merge_method: task_arithmetic
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
parameters: {normalize: true}
"""),
    Case("ties", """
merge_method: ties
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5, density: 0.3}}
  - {model: m2, parameters: {weight: 0.3, density: 0.5}}
  - {model: m3, parameters: {weight: 0.4, density: 0.9}}
parameters: {lambda: 1.2}
""", TRIMMED, TRIMMED_BF16, whole=True, difference=THRESHOLD + BF16_DELTAS),
    Case("ties_untrimmed", """
merge_method: ties
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
  - {model: m3, parameters: {weight: 0.4}}
""", bf16=TRIMMED_BF16, difference=BF16_SIGNS),
    Case("ties_sum", """
merge_method: ties
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
parameters: {normalize: false, density: 0.5}
""", TRIMMED, TRIMMED_BF16, whole=True, difference=THRESHOLD + BF16_DELTAS),
    Case("breadcrumbs", """
merge_method: breadcrumbs
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5, density: 0.6, gamma: 0.05}}
  - {model: m2, parameters: {weight: 0.3, density: 0.5, gamma: 0.1}}
""", TRIMMED, TRIMMED_BF16, whole=True, difference=THRESHOLD + BF16_DELTAS),
    Case("breadcrumbs_ties", """
merge_method: breadcrumbs_ties
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
  - {model: m3, parameters: {weight: 0.4}}
parameters: {density: 0.5, gamma: 0.05}
""", TRIMMED, TRIMMED_BF16, whole=True, difference=THRESHOLD + BF16_DELTAS),
    Case("dare_linear", """
merge_method: dare_linear
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5, density: 0.4}}
  - {model: m2, parameters: {weight: 0.3, density: 0.7}}
""", Alike(), Alike(), difference=RANDOM),
    Case("dare_linear_one", """
merge_method: dare_linear
base_model: m0
models: [{model: m1, parameters: {weight: 1, density: 0.4}}]
parameters: {rescale: false}
""", Alike(), Alike(), difference=RANDOM),
    Case("dare_ties", """
merge_method: dare_ties
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5, density: 0.4}}
  - {model: m2, parameters: {weight: 0.3, density: 0.7}}
  - {model: m3, parameters: {weight: 0.4, density: 0.5}}
""", Alike(), Alike(), difference=RANDOM),
    Case("della_linear_one", """
merge_method: della_linear
base_model: m0
models: [{model: m1, parameters: {weight: 1, density: 0.5, epsilon: 0.4}}]
""", Alike(), Alike(), whole=True, difference=RANDOM),
    Case("della", """
merge_method: della
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5, density: 0.4}}
  - {model: m2, parameters: {weight: 0.3, density: 0.7}}
  - {model: m3, parameters: {weight: 0.4, density: 0.5, epsilon: 0.3}}
""", Alike(), Alike(), whole=True, difference=RANDOM),
    Case("della_undropped", """
merge_method: della
base_model: m0
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
  - {model: m3, parameters: {weight: 0.4}}
""", bf16=TRIMMED_BF16, difference=BF16_SIGNS),
    Case("sce", """
merge_method: sce
base_model: m0
models: [{model: m1}, {model: m2}, {model: m3}]
""", LENGTHS, TRIMMED_BF16, whole=True, difference=BF16_SIGNS),
    Case("sce_selected", """
merge_method: sce
base_model: m0
models: [{model: m1}, {model: m2}, {model: m3}]
parameters: {select_topk: 0.4}
""", Near(ulps=2, share=0.45, rms=0.06), Near(ulps=2, share=0.45, rms=0.15), whole=True,
         difference=THRESHOLD + BF16_DELTAS
         + "What is selected decides the parents' weights, so one element more moves all a little. "),
    Case("model_stock", """
merge_method: model_stock
base_model: m0
models: [{model: m1}, {model: m2}, {model: m3}]
""", LENGTHS, LENGTHS_BF16, whole=True),
    Case("model_stock_rows", """
merge_method: model_stock
base_model: m0
models: [{model: m1}, {model: m2}, {model: m3}]
parameters: {filter_wise: true}
""", LENGTHS, LENGTHS_BF16),
    Case("nearswap", """
merge_method: nearswap
base_model: m0
models: [{model: m1}]
parameters: {t: 0.01}
"""),
    Case("arcee_fusion", """
merge_method: arcee_fusion
base_model: m0
models: [{model: m1}]
""", TRIMMED, None, whole=True,
         difference="bf16: mergekit's softmax in bf16 leaves only noise of the divergence. "),
    Case("ram", """
merge_method: ram
base_model: m0
models: [{model: m1}, {model: m2}, {model: m3}]
parameters: {epsilon: 0.02}
""", bf16=TRIMMED_BF16, difference="bf16: task vectors near epsilon, rounded, cross it. "),
    Case("ramplus", """
merge_method: ramplus_tl
base_model: m0
models: [{model: m1}, {model: m2}, {model: m3}]
parameters: {epsilon: 0.02, r: 0.5, alpha: 0.6}
""", bf16=None, whole=True,
         difference="bf16: mergekit's child is fp32, since its counts are; darwin's is as its father. "),
    Case("passthrough", """
merge_method: passthrough
models: [{model: m1}]
""", Near(ulps=0), Near(ulps=0)),
    Case("passthrough_scaled", """
merge_method: passthrough
models: [{model: m1}]
parameters:
  scale:
    - {filter: o_proj, value: 0.3}
    - {filter: down_proj, value: [0.5, 1.5]}
    - {value: 1}
""", Near(ulps=1), Near(ulps=1)),
    Case("stacked", """
merge_method: passthrough
slices:
  - sources: [{model: m1, layer_range: [0, 3]}]
  - sources: [{model: m2, layer_range: [1, 4]}]
""", Near(ulps=0), Near(ulps=0), fails_for=("qwen3",),
         difference="mergekit leaves the config's layer_types as they are, which qwen3 refuses. "),
    Case("stacked_merges", """
merge_method: linear
slices:
  - sources:
      - {model: m1, layer_range: [0, 2], parameters: {weight: 0.7}}
      - {model: m2, layer_range: [0, 2], parameters: {weight: [0.1, 0.9]}}
  - sources:
      - {model: m1, layer_range: [2, 4], parameters: {weight: [0.2, 0.4]}}
      - {model: m3, layer_range: [1, 3], parameters: {weight: 0.5}}
""", bf16=FP32_INSIDE),
    Case("gradients_and_filters", """
merge_method: task_arithmetic
base_model: m0
models:
  - model: m1
    parameters:
      weight:
        - {filter: self_attn, value: [0.0, 0.5, 0.2]}
        - {filter: mlp, value: [1.0, 0.4]}
        - {value: 0.6}
  - model: m2
    parameters:
      weight: [0.9, 0.1, 0.3]
  - model: m3
    parameters:
      weight:
        - {filter: layers.1., value: 0.25}
parameters:
  weight: [0.35, 0.15]
  lambda: [1.0, 0.5]
"""),
    Case("slerp_gradient", """
merge_method: slerp
base_model: m1
slices:
  - sources:
      - {model: m1, layer_range: [0, 4]}
      - {model: m2, layer_range: [0, 4]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: float32
out_dtype: bfloat16
""", FP32_INSIDE, FP32_INSIDE, whole=True),
    Case("wider_output", """
merge_method: linear
models:
  - {model: m1, parameters: {weight: 0.5}}
  - {model: m2, parameters: {weight: 0.3}}
dtype: float32
""", Near(ulps=2), Near(ulps=2)),
)  # fmt: skip

REFUSED = (
    Refused("unknown_key", """
merge_method: linear
models: [{model: m1, parameters: {weight: 1}}, {model: m2, parameters: {weight: 1}}]
out_type: float32
""", "out_type"),
    Refused("unknown_parameter", """
merge_method: ties
base_model: m0
models: [{model: m1, parameters: {weight: 1, densty: 0.3}}, {model: m2, parameters: {weight: 1}}]
""", "densty"),
    Refused("shared_parameter_of_a_model", """
merge_method: task_arithmetic
base_model: m0
models: [{model: m1, parameters: {weight: 1, lambda: 0.5}}, {model: m2, parameters: {weight: 1}}]
""", "lambda"),
    Refused("nuslerp_columns", """
merge_method: nuslerp
models: [{model: m1, parameters: {weight: 0.6}}, {model: m2, parameters: {weight: 0.2}}]
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""", "nuslerp_row_wise"),
    Refused("nothing_to_divide_by", """
merge_method: linear
models: [{model: m1, parameters: {weight: 1}}, {model: m2, parameters: {weight: -1}}]
""", "weight"),
)  # fmt: skip

"""What kind of work every operator is, as ONNX Runtime names it once it has rewritten a graph."""

from __future__ import annotations

PRODUCTS, ATTENTION, NORMS, ELEMENTWISE = "products", "attention", "norms", "element-wise"
QUANTISING, SHAPES, CONTROL, OTHER = "quantising", "shapes", "control", "other"
KINDS = (PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, QUANTISING, SHAPES, CONTROL, OTHER)

CONVOLUTIONS = ("Conv", "FusedConv", "ConvInteger", "QLinearConv")
INT8 = (
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QGemm",
    "QLinearConv", "QLinearMatMul",
)  # fmt: skip
MATRICES = (
    "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "QGemm", "QLinearMatMul",
)  # fmt: skip
_OPERATORS = {
    PRODUCTS: (*CONVOLUTIONS, *MATRICES),
    ATTENTION: ("Attention", "GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding"),
    NORMS: (
        "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ),
    ELEMENTWISE: (
        "Abs", "Add", "And", "ArgMax", "AveragePool", "BiasGelu", "CumSum", "Div", "Equal", "Erf", "Exp", "FastGelu",
        "Gelu", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Log", "LogSoftmax", "Max", "Min", "Mul",
        "Neg", "Not", "Or", "Pow", "QuickGelu", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "Relu",
        "Sigmoid", "Softmax", "Sqrt", "Sub", "Tanh", "Where",
    ),
    QUANTISING: ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear", "QuantizeWithOrder"),
    SHAPES: (
        "Cast", "Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity",
        "Pad", "Range", "ReorderInput", "ReorderOutput", "Reshape", "ScatterElements", "ScatterND", "Shape", "Slice",
        "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze",
    ),
    CONTROL: ("If", "Loop", "Scan"),  # what is inside them counts as what it is
}  # fmt: skip
_KIND = {operator: kind for kind, operators in _OPERATORS.items() for operator in operators}


def kind_of(operator: str) -> str:
    """The kind of an operator; `OTHER` if nobody has said."""
    return _KIND.get(operator, OTHER)



# PyPI's wheel is built for CUDA: beside torch for the CPU it has no operators, and stops where it gives them shapes.
if not _has_ops():
    _OPERATORS = torch.library.Library("torchvision", "DEF")
    _OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

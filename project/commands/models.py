"""Lists the networks: python -m project.cli models 'resnet*'."""

import fnmatch
import importlib
import inspect
import math
import pkgutil

from project import models as networks
from project.errors import UserError, did_you_mean


def models(pattern: str = "*", /) -> int:
    """Lists the networks that --model.name takes, with the figures that torchvision publishes.

    Parameters and GFLOPs (multiplications with their additions, at the size of the weights' images) are those of the
    network with ImageNet's 1,000 classes, accuracy that of the named weights on ImageNet's validation images. Exits
    with 0.

    Args:
        pattern: Part of the names, or a pattern with * and ?; `timm/*` lists timm's, which publishes no such figures.
    """
    wanted = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
    timm = networks.import_timm() if pattern.startswith(networks.TIMM) else None
    own = own_networks()
    known = [networks.TIMM + name for name in timm.list_models()] if timm else [*networks.torchvision_names(), *own]
    names = fnmatch.filter(known, wanted)
    if not names:
        near = did_you_mean(pattern, known)
        raise UserError(f"No network is called {pattern}.{near} Without a pattern all are listed.")
    if timm:
        trained = {networks.TIMM + name.split(".")[0] for name in timm.list_pretrained()}
        print("\n".join(f"{name}{'  weights: DEFAULT' * (name in trained)}" for name in names))
        return 0

    from torchvision.models import get_model_weights

    width = max(map(len, names))
    print(f"{'name':{width}}  {'parameters':>12}  {'GFLOPs':>7}  {'top-1':>6}  {'top-5':>6}  --model.weights")
    for name in names:
        if name in own:
            print(f"{name}  an own network: --model.network {name}")
            continue
        choices = get_model_weights(name)
        for entry in choices:
            accuracy = entry.meta.get("_metrics", {}).get("ImageNet-1K", {})
            top = [f"{accuracy[key]:6.2f}" if key in accuracy else f"{'-':>6}" for key in ("acc@1", "acc@5")]
            default = " (DEFAULT)" if entry == choices.DEFAULT and len(choices) > 1 else ""
            figures = f"{entry.meta['num_params']:12,}  {entry.meta.get('_ops', math.nan):7.2f}  {'  '.join(top)}"
            print(f"{name:{width}}  {figures}  {entry.name}{default}")
    return 0


def own_networks() -> list[str]:
    """The class paths of the networks in project/models/ that have no short name."""
    found = []
    for entry in pkgutil.iter_modules(networks.__path__, f"{networks.__name__}."):
        for name, kind in vars(importlib.import_module(entry.name)).items():
            is_own = inspect.isclass(kind) and kind.__module__ == entry.name and name != "AlexNet"
            if is_own and "num_classes" in inspect.signature(kind).parameters:
                found.append(f"{entry.name}.{name}")
    return found

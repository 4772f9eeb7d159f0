"""Register donors with transformers' AutoClasses, without importing torch early.

`import transformers` is lazy, and so is `import not_hf`: the config class is registered when transformers imports its
table of config classes, and the model classes when the first `DonorConfig` is made.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

CONFIG_TABLE = "transformers.models.auto.configuration_auto"


def register_config() -> None:
    """Register `DonorConfig` now, or when transformers imports its table of config classes."""
    if CONFIG_TABLE in sys.modules:
        _register_config()
    elif not any(isinstance(finder, _ConfigTableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ConfigTableFinder())


@functools.cache
def register_models() -> None:
    """Register model and tokenizer classes; `DonorConfig` calls it when the first one is made."""
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    from not_hf.config import DonorConfig
    from not_hf.donor.modeling import DonorModel
    from not_hf.donor.tokenizer import DonorProcessor, DonorTokenizer
    from not_hf.recipient.heads import BY_ID

    AutoModel.register(DonorConfig, DonorModel, exist_ok=True)
    for kind in BY_ID:
        kind.native_auto_class.register(DonorConfig, kind, exist_ok=True)
    AutoTokenizer.register(DonorConfig, DonorTokenizer, exist_ok=True)
    AutoProcessor.register(DonorConfig, DonorProcessor, exist_ok=True)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from not_hf.config import DonorConfig

    AutoConfig.register(DonorConfig.model_type, DonorConfig, exist_ok=True)


class _ConfigTableFinder(MetaPathFinder):
    """Finds transformers' table of config classes as Python does, and adds `DonorConfig` once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != CONFIG_TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then(spec.loader, _register_config)  # type: ignore
        return spec


def _then(loader: Loader, follow_up: Callable[[], None]) -> Callable[[ModuleType], None]:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        follow_up()

    return exec_module

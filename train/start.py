"""Starting a run from an existing model: which settings go with it, and how its parameters are loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig
from isthmus.model.device.hardware import default_dtype, platform_of
from isthmus.model.execution import Execution, Remat
from isthmus.model.ops.kernels import choose
from isthmus.model.ops.operation import Setting
from isthmus.model.process.progress import stages
from isthmus.model.transformer import Params
from isthmus.model.weights.folder import ModelFolder, open_folder
from isthmus.model.weights.hub import FolderOptions
from isthmus.train.config import DataConfig, OptimizerConfig, TrainConfig, flat


def fine_tuning(path: Path, *, adapters: bool = False, options: FolderOptions | None = None) -> TrainConfig:
    """The default settings for fine-tuning the model in `path`. Raises ConfigError when it isn't a model's folder."""
    folder = open_folder(path, options)
    model = folder.config
    accelerator, large = default_dtype() != "float32", model.parameters > 500e6
    remat: Remat = "full" if accelerator and large else "none"
    return TrainConfig(
        init=path,
        preset="",
        model=model,
        execution=Execution(default_dtype(), scan_layers=accelerator, remat=remat),
        text=DataConfig().fitted(model.context_length),
        optimizer=OptimizerConfig(lr=2e-4 if adapters else 2e-5),
    )


def open_start(config: TrainConfig) -> ModelFolder | None:
    """Opens the folder that `init` names; None if it names none. Raises ConfigError naming a setting that doesn't go
    with it."""
    if config.init is None:
        if config.model.lora.rank:
            raise ConfigError("model.lora.rank needs --init: adapters are trained on an existing model")
        return None
    if config.init.resolve() == config.out.resolve():
        raise ConfigError(f"out: {config.out} is the folder that --init names; name another one")
    if config.text.tokenizer is not None:
        raise ConfigError("text.tokenizer can't be set with --init: the model has its own")
    folder = open_folder(config.init, FolderOptions(ignore_field=config.ignore_field, download=config.download))
    if folder.adapter is not None:
        raise ConfigError(f"init: {config.init} is an adapter; start from the model that it was trained on")
    theirs, ours = (flat(dataclasses.asdict(model)) for model in (folder.config, config.model))
    for name, value in theirs.items():
        if not name.startswith("lora.") and ours[name] != value:
            raise ConfigError(f"model.{name} can't be set with --init: it is {value!r} in {config.init}")
    if config.model.lora.rank and (config.out / "config.json").is_file():
        raise ConfigError(f"out: {config.out} holds a model already; adapters need a folder of their own")
    return folder


def with_kernels(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """`config` with the kernels that its `kernels` setting means on these devices. Raises ConfigError."""
    execution, device = config.execution, mesh.devices.flat[0]
    setting = Setting(
        config.model,
        execution.dtype,
        platform_of(device),
        mesh.size,
        takes_gradients=True,
        scans_layers=execution.scan_layers,
    )
    kernels = choose(config.kernels, setting)
    return dataclasses.replace(config, execution=dataclasses.replace(execution, kernels=kernels))


def load_start(folder: ModelFolder, config: TrainConfig, mesh: Mesh, console: Console) -> Params:
    """The folder's parameters, without adapters, in the run's layout and shardings. They are float32 if they are
    trained; if adapters are trained, they have the dtypes in which a step reads them."""
    dtype = config.execution.dtype if config.model.lora.rank else None
    plain = folder.with_config(lora=LoraConfig())
    with stages(console) as shown:
        loading = shown.begin("loading weights", folder.nbytes or None)
        return plain.load_params(mesh, dtype, loading.advance, stacked=config.execution.scan_layers)

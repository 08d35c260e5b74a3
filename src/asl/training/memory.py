"""How much memory a training takes on its device, found out without that device.

A rehearsed training (`asl.training.rehearsal`) runs the very code of a training on tensors without
values. What is counted is each piece of memory that its operations make, for as long as something
holds it.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import astuple, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asl.distributed import precision, world_size
from asl.errors import TrainingError, UsageError
from asl.evaluation.average import Scores
from asl.evaluation.score import score
from asl.images.augment import draw
from asl.images.loader import Batch
from asl.images.prepare import augments_on_device, preparation
from asl.models.build import normalization
from asl.models.inference import for_inference
from asl.training.rehearsal import Rehearsal
from asl.training.settings import TrainConfig
from asl.training.step import Training

GB = 10**9
GPU = torch.device("cuda:0")
BLOCK = 512  # bytes: CUDA's allocator of torch gives out multiples of it
# What a GPU holds beside the tensors. CUDA's context with the kernels of torch, cuDNN and cuBLAS
# takes about half a gigabyte, the workspaces of convolutions and matrix products the rest; what
# falls between the blocks of the allocator grows with what it gives out.
CUDA_ITSELF, CUDA_SHARE = 1 * GB, 0.05
FAR = 16  # times the batch, for the slope of its memory


@dataclass(frozen=True)
class Memory:
    """What the tensors of a training take, in bytes, when they take most.

    `activations` are all but the other four: what the forward pass keeps for the backward pass, the
    batch, and what is computed just then. Gradients count in full, although the last of them are
    made when the first activations are gone. Where a validation takes more than a step, its copies
    of the weights count as activations.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(astuple(self))

    @property
    def of_gpu(self) -> int:
        """What a GPU must have for it, CUDA's own share included."""
        return round(CUDA_ITSELF + (1 + CUDA_SHARE) * self.peak)


@dataclass(frozen=True)
class Growth:
    """The `memory` with `batch_size` images on the device, and the bytes that each more takes."""

    batch_size: int
    memory: Memory
    per_image: float

    def largest_batch(self, size: int) -> int:
        """How many images fit a GPU of `size` bytes; 0 if not even one."""
        more = (size - self.memory.of_gpu) / (1 + CUDA_SHARE) // self.per_image
        return max(0, self.batch_size + int(more))


def growth(
    config: TrainConfig, model: nn.Module, loss: nn.Module, device: torch.device, batch_size: int
) -> Growth:
    """Two estimates, from which follows how large a batch may be.

    The second is of a batch so large that activations are nearly all of it. Before, the peak may be
    where gradients are, or in the validation.
    """
    memory, far = (
        estimate(config, model, loss, device, count) for count in (batch_size, FAR * batch_size)
    )
    return Growth(batch_size, memory, (far.peak - memory.peak) / ((FAR - 1) * batch_size))


def estimate(
    config: TrainConfig, model: nn.Module, loss: nn.Module, device: torch.device, batch_size: int
) -> Memory:
    """The memory of one process that trains `model` as `config` says on a device of that type.

    `batch_size` images are on the device at once. The model and the loss stay as they are, and the
    device need not be there. It takes seconds: a few steps and a validation are rehearsed, on a GPU
    also where a CPU is meant, which keeps the same tensors. `--compile` is left out: models that
    are compiled usually take less.
    """
    rehearsal, live = Rehearsal(), _Storages(GPU)
    amp = config.compute.amp if device.type == "cuda" or config.compute.amp != "auto" else "off"
    # Of three batches or more the second has all that the others have: gradients are there already.
    accumulate = min(2, config.step.accumulate)
    settings = config.step.replace(compile=False, accumulate=accumulate)
    model, loss = (rehearsal.copy_of(module, GPU) for module in (model, loss))
    with rehearsal.on(GPU), live:
        live.follow(chain(model.parameters(), model.buffers()))
        weights = live.bytes
        training = Training(
            model, loss, settings, batches_per_epoch=2 * accumulate, device=GPU, amp=amp
        )
        averages = live.bytes - weights
        images = torch.empty(batch_size, 3, *2 * [config.images.image_size], dtype=torch.uint8)
        num_classes: int = model.num_classes  # type: ignore[assignment]  # timm's models say
        targets = torch.zeros(batch_size, num_classes, dtype=torch.int8)
        augmentation = None
        if augments_on_device(config.augment, device.type):
            augmentation = draw(config.augment.augment, 0, 0, range(batch_size))
        batch = Batch(images, targets, augmentation)
        prepare = preparation(*normalization(model), GPU, training.precision)
        for _ in range(2 * accumulate):  # the optimizer has a state in the second step
            training.step(prepare(batch), targets.to(GPU))
        _validate(training, batch, amp)
    gradients = _size(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = _size(chain(*(state.values() for state in training.optimizer.state.values())))
    rest = live.peak - weights - averages - optimizer - gradients
    return Memory(weights, gradients, optimizer, averages, rest)


def _validate(training: Training, batch: Batch, amp: str) -> None:
    models = [for_inference(deepcopy(each)) for each in (training.ema.module, training.model)]
    computed_in = precision(amp, GPU, training=False)
    prepare = preparation(*normalization(training.model), GPU, computed_in)
    scorers = [Scores(model) for model in models]
    score(scorers, [batch._replace(augmentation=None)], prepare, computed_in)


@contextmanager
def out_of_memory_explained(
    config: TrainConfig, training: Training, batch_size: int
) -> Iterator[None]:
    """Around steps of `batch_size` images: a device that is too small becomes a `TrainingError`.

    It says what to lower, and by how much.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        size = _memory_of(training.device)
        about = f" of {size / GB:.1f} GB" * (size > 0)
        raise TrainingError(
            f"{training.device}{about} is out of memory with {batch_size} images a step: "
            + _advice(config, training, batch_size, size)
        ) from None


def _memory_of(device: torch.device) -> int:
    """What this process may use of the device, in bytes; 0 where that is not known."""
    if device.type != "cuda":
        return 0
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def _advice(config: TrainConfig, training: Training, batch_size: int, size: int) -> str:
    asked = training.model, training.loss, training.device, batch_size
    try:
        grown = growth(config, *asked)
    except Exception:  # a model may do what tensors without values cannot
        return "lower --batch-size"
    fitting = grown.largest_batch(size)
    text = f"{grown.memory.of_gpu / GB:.1f} GB are needed, by the estimate. "
    if fitting >= batch_size:
        return text + "That should fit: does something else use the device? Or lower --batch-size"
    text += "Lower --batch-size"
    if fitting:
        text += f" to {fitting * world_size()}"
        times = -(-config.step.accumulate * batch_size // fitting)
        if config.loss.loss != "twoway":  # which takes no other batches into its steps
            text += f", with --accumulate {times} for steps as large"
    if not config.step.checkpoint_activations:
        with suppress(UsageError):  # of a model that cannot do that
            less = config.with_settings(checkpoint_activations=True, compile=False)
            needed = estimate(less, *asked).of_gpu
            text += f", or take --checkpoint-activations ({needed / GB:.1f} GB)"
    return text


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In the block, the `bytes` of all memory on `device` that operations make; their `peak`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.bytes, self.peak = device, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.follow(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of these tensors, once for all views of it, until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device != self.device or storage._cdata in self._known:
                continue
            size = _blocks(storage.nbytes())
            self._known.add(storage._cdata)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(_blocks(tensor.nbytes) for tensor in tensors)


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

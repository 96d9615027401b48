"""A model as one file for other programs, checked against the model: ONNX and torch.export."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tpvprune.disk.atomic import written_file
from tpvprune.passes.batches import unlabeled
from tpvprune.passes.costs import call_arguments
from tpvprune.runtimes.names import WRITES_ONNX, missing
from tpvprune.runtimes.onnx_files import onnx_program, onnx_session, quiet, reason

Format = Literal["onnx", "pt2"]
Call = Callable[[Tensor], list[Tensor]]
TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2  # bfloat16 holds eight bits
_ONNX_PACKAGES = (*WRITES_ONNX, "onnxruntime")
_SIZES = (1, 2, 5)  # batches that a file with a free batch size must take


@dataclass(frozen=True)
class Exported:
    """A written file and how well it agrees with the model.

    ``difference`` is the largest absolute difference of an output, as a fraction of the largest
    absolute output of its batch.
    """

    file: Path
    format: Format
    input_shape: tuple[int | None, ...]  # of one batch; None first where the batch size is free
    num_random: int  # random inputs that were compared
    num_given: int  # inputs of ``batches`` that were compared
    difference: float


def export_model(
    model: nn.Module,
    example_inputs: Tensor,
    file: str | Path,
    *,
    format: Format = "onnx",
    dynamic_batch: bool = False,
    batches: Iterable[Any] = (),
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model for other programs, read the file back and compare its outputs.

    An ONNX file runs in onnxruntime and many other engines; the comparison runs it in
    onnxruntime on the CPU. A ``.pt2`` file is ``torch.export``'s: ``torch.export.load(file)
    .module()`` runs it without the code of the model. The file takes its name only after every
    output was compared: a failure leaves nothing behind, and an old file as it was.

    Args:
        model: What to export, in eval mode; untouched.
        example_inputs: A batch [B, ...]; B is the batch size of the file unless that is free.
        file: Where to write.
        format: ``"onnx"`` (needs the extra ``tpvprune[onnx]``) or ``"pt2"``.
        dynamic_batch: Leave the batch size free; sizes 1, 2 and 5 are then compared.
        batches: Inputs [B, ...] to compare on besides random ones; labels are dropped. Of a
            fixed batch size only full batches are taken.
        overwrite: Replace a file that is there.
        metadata: Plain values that are stored in the file, as JSON, under their names.

    Returns:
        The file, and how far its outputs are from the model's.

    Raises:
        ValueError: If a package is missing, the file may not be written, the model cannot be
            exported, or an output differs by more than 1e-4 of the largest (2e-2 in half
            precision).
    """
    file = Path(file).expanduser()
    check_target(file, format, overwrite=overwrite)
    size = max(2, len(example_inputs)) if dynamic_batch else len(example_inputs)
    still = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    example = call_arguments(still, _random((size, *example_inputs.shape[1:])))[0]
    given = [batch.cpu() for batch in unlabeled(batches)] if batches else []
    notes = {str(name): json.dumps(value) for name, value in (metadata or {}).items()}
    write = {"onnx": _write_onnx, "pt2": _write_pt2}[format]
    with written_file(file) as unfinished:
        with quiet():
            try:
                call = write(still, example, unfinished, dynamic=dynamic_batch, notes=notes)
            except Exception as error:  # whatever the exporter makes of a model
                if isinstance(error, OSError):  # that is the disk
                    raise
                raise ValueError(f"cannot be exported to {format} ({reason(error)})") from error
        sizes = _SIZES if dynamic_batch else (size,)
        random = [_random((n, *example.shape[1:]), seed=n) for n in sizes]
        parts = given if dynamic_batch else [p for b in given for p in b.split(size)]
        real = [part for part in parts if dynamic_batch or len(part) == size]
        difference = _compared(still, call, [*random, *real], format)
    shape = (None if dynamic_batch else size, *example.shape[1:])
    num = [sum(map(len, inputs)) for inputs in (random, real)]
    return Exported(file, format, shape, num[0], num[1], difference)


def _write_pt2(
    model: nn.Module, example: Tensor, file: Path, *, dynamic: bool, notes: dict[str, str]
) -> Call:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    # Through memory: on a full disk torch's own writer would end the process.
    archive = io.BytesIO()
    torch.export.save(program, archive, extra_files=notes)
    file.write_bytes(archive.getbuffer())
    with file.open("rb") as handle:
        loaded = torch.export.load(handle).module()
    return lambda inputs: tree_leaves(loaded(inputs))


def _write_onnx(
    model: nn.Module, example: Tensor, file: Path, *, dynamic: bool, notes: dict[str, str]
) -> Call:
    program = onnx_program(model, example, dynamic=dynamic)
    program.model.metadata_props.update(notes)
    program.save(file, external_data=False)
    session = onnx_session(str(file))
    name = session.get_inputs()[0].name
    return lambda inputs: [torch.from_numpy(x) for x in session.run(None, {name: inputs.numpy()})]


def check_target(file: Path, format: str, *, overwrite: bool) -> None:
    """Find out before any work is done whether a file of this format can be written."""
    if format not in get_args(Format):
        raise ValueError(f"format: expected 'onnx' or 'pt2', found {format!r}")
    if file.is_dir():
        raise ValueError(f"{file}: expected a file name, found a folder")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already: pass overwrite=True or another name")
    lacking = [] if format == "pt2" else missing(_ONNX_PACKAGES)
    if lacking:
        raise ValueError(
            f"onnx: expected the packages {', '.join(_ONNX_PACKAGES)}, found no "
            f"{' and no '.join(lacking)}: pip install 'tpvprune[onnx]', or use format pt2"
        )


@torch.no_grad()
def _compared(model: nn.Module, call: Call, batches: list[Tensor], format: Format) -> float:
    """Return the largest relative difference; ValueError if it is above the tolerance."""
    largest = 0.0
    for batch in batches:
        inputs = call_arguments(model, batch)[0]
        expected = tree_leaves(model(inputs))
        try:
            found = call(inputs)
        except Exception as error:  # whatever the engine makes of the file
            raise ValueError(
                f"the {format} file does not run on a batch of {len(inputs)} ({reason(error)})"
            ) from error
        if [x.shape for x in expected] != [x.shape for x in found]:
            raise ValueError(
                f"the {format} file gives outputs {[tuple(x.shape) for x in found]}, the model "
                f"{[tuple(x.shape) for x in expected]}: nothing was written"
            )
        tolerance = TOLERANCE if inputs.dtype.itemsize >= 4 else _HALF_TOLERANCE
        for one, other in zip(expected, found, strict=True):
            scale = float(one.double().abs().max()) or 1.0
            difference = float((one.double() - other.double()).abs().max()) / scale
            if not difference <= tolerance:
                raise ValueError(
                    f"the {format} file differs from the model by {difference:.2g} of its largest "
                    f"output, more than {tolerance:g}: nothing was written"
                )
            largest = max(largest, difference)
    return largest


def _random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

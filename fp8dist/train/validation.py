"""The loss on text that is not trained on."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fp8dist.train.config import JobConfig
from fp8dist.train.distributed import agree, same_everywhere
from fp8dist.train.documents import Document, find_documents
from fp8dist.train.model import Llama
from fp8dist.train.packing import Batch
from fp8dist.train.parallelize import Loss
from fp8dist.train.tensor_parallel import loss_context
from fp8dist.train.tokenizer import Tokenizer

ORDER_SEED = 0
"""Documents are read in one order whatever debug.seed is, so that runs can be compared."""


class Validator:
    """Measures the loss of the same text every time, packed as the training text is.

    Args:
        model, loss: as they train.
        rank, world: this rank's place among the data-parallel ranks.

    Raises:
        ValueError: on every rank: there is no text, or not enough of it for one global batch.
    """

    def __init__(
        self,
        job: JobConfig,
        model: Llama,
        loss: Loss,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        rank: int,
        world: int,
    ):
        section = job.validation
        self._job, self._model, self._loss, self._device = job, model, loss, device
        self._tokenizer, self._rank, self._world = tokenizer, rank, world
        self._steps = section.steps
        self._seq_len = section.seq_len or job.training.seq_len
        self._batch = section.local_batch_size or job.training.local_batch_size
        self._documents = agree(lambda: _shuffled(job))
        amount = (len(self._documents), sum(one.length for one in self._documents))
        same_everywhere(amount, "the validation text (documents, bytes)")
        if next(self._batches(), None) is None:
            raise ValueError(
                f"the validation text has less than one global batch of {self._batch} sequences "
                f"of {self._seq_len} tokens on each of {world} data-parallel ranks: set "
                "validation.local_batch_size or validation.seq_len lower, or "
                "validation.dataset_path to more text"
            )

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss over all ranks in nats per token; every rank must call this.

        What training goes on with is left as it is: parameters, gradients, buffers and data.
        """
        total, batches = torch.zeros((), device=self._device), 0
        self._model.eval()
        for tokens, targets in self._batches():
            logits = self._model(tokens.to(self._device))
            with loss_context(self._job):
                loss = self._loss(logits, targets.to(self._device))
            total += loss.full_tensor() if isinstance(loss, DTensor) else loss
            batches += 1
        self._model.train()
        for module in self._model.modules():
            # Else the next step would find parameters gathered, and gather less than the others.
            if isinstance(module, FSDPModule):
                module.reshard()
        dist.all_reduce(total)
        return total.item() / (batches * dist.get_world_size())

    def _batches(self) -> Iterator[Batch]:
        """This rank's part of each whole global batch, up to `validation.steps`."""
        count, whole = 0, self._batch * self._world
        mine = slice(self._rank * self._batch, (self._rank + 1) * self._batch)
        stream, start = np.empty(0, dtype=np.int64), 0
        wanted = whole * self._seq_len + 1  # the last target is the first token of what follows
        for document in self._documents:
            tokens = self._tokenizer.encode(document.read())
            stream = np.concatenate((stream[start:], tokens, [self._tokenizer.separator]))
            start = 0
            while len(stream) - start >= wanted:
                if count == self._steps:
                    return
                part = torch.from_numpy(stream[start : start + wanted])
                start += wanted - 1
                count += 1
                inputs, targets = (x.view(whole, -1)[mine] for x in (part[:-1], part[1:]))
                yield Batch(inputs, targets)


def _shuffled(job: JobConfig) -> list[Document]:
    """All documents: those of the first steps are of all kinds."""
    documents = find_documents(job.validation.text_path, "validation")
    order = np.random.default_rng(ORDER_SEED).permutation(len(documents))
    return [documents[index] for index in order]

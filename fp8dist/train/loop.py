"""One training run, from a configuration to its record."""

import logging
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fp8dist
from fp8dist.train.checkpoint import Checkpointer
from fp8dist.train.config import JobConfig
from fp8dist.train.data import build_dataset, find_data
from fp8dist.train.distributed import agree, same_everywhere
from fp8dist.train.documents import reference_entropies
from fp8dist.train.metrics import Reporter, RunRecord, new_record, timed, write_json
from fp8dist.train.model import model_shape
from fp8dist.train.moe import MoE, balance
from fp8dist.train.optimizer import build_optimizer, set_learning_rate
from fp8dist.train.parallelize import build_loss, build_mesh, build_model
from fp8dist.train.plot import plot_losses
from fp8dist.train.profiling import traces
from fp8dist.train.same_run import check_same, facts_of_job, facts_of_model
from fp8dist.train.tensor_parallel import loss_context
from fp8dist.train.validation import Validator
from fp8dist.train.wire import count_all_gathers

logger = logging.getLogger(__name__)


class Trainer:
    """One run on this rank; the process group must be there.

    Raises:
        ValueError: on every rank: the ranks do not run the same, the configuration does not fit
            them, job.dump_folder is no folder, the data cannot be used, or the checkpoint is of
            another run.
    """

    def __init__(self, job: JobConfig, device: torch.device):
        self.job, self.device = job, device
        self.folder = Path(job.job.dump_folder)
        if job.debug.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch then asks for
            torch.use_deterministic_algorithms(True)

        check_same(facts_of_job(job))
        agree(self._make_folder)
        documents, tokenizer = agree(lambda: find_data(job))
        amount = (len(documents), sum(document.length for document in documents))
        same_everywhere(amount, "the training text (documents, bytes)")
        shape = model_shape(job.model.flavor, tokenizer.vocab_size)
        mesh = build_mesh(job, device, dist.get_world_size())
        # Replicas are data-parallel too: they take different parts of the batch. The ranks of
        # tensor parallelism, the mesh's last dimension, take the same.
        degree = job.parallelism.tensor_parallel_degree
        rank, world = dist.get_rank() // degree, dist.get_world_size() // degree
        self.data = build_dataset(job, documents, tokenizer, rank=rank, world=world)
        self.model = build_model(job, shape, mesh, device)
        check_same(facts_of_model(self.model))
        self.experts = [module for module in self.model.modules() if isinstance(module, MoE)]
        self.wire = count_all_gathers(self.model)
        self.loss = build_loss(job)
        self.optimizer = build_optimizer(self.model, job)
        self.checkpointer = (
            Checkpointer(job.checkpoint, self.folder, self.model, self.optimizer)
            if job.checkpoint.enable
            else None
        )
        self.validator = (
            Validator(job, self.model, self.loss, tokenizer, device, rank=rank, world=world)
            if job.validation.enable
            else None
        )
        self.record = new_record(job, device, self.model)
        if tokenizer.name == "bytes":
            self.record.set_entropies(reference_entropies(documents))
        logger.info(
            f"{job.model.flavor}: {self.record.parameters / 1e6:.1f} million parameters, "
            f"{self.record.ranks} ranks on {self.record.device}, {len(documents)} documents, "
            f"tokenizer: {tokenizer.name}"
        )
        if device.type == "cuda" and job.float8_enabled and not job.compile.enable:
            logger.info(
                "not compiled: every float8 cast is a pass over memory of its own, and float8 "
                "can be slower than bf16; add --compile.enable"
            )

    def _make_folder(self) -> None:
        """Where rank 0 leaves the record; that it cannot be is said now, not after training."""
        if dist.get_rank() != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(
                f"job.dump_folder: {self.folder} cannot be written to ({error.strerror}): choose "
                "another"
            ) from error

    def train(self) -> RunRecord:
        """Train to the last step, from the newest checkpoint if there is one.

        Rank 0 leaves `run.json` and `loss.png` in the dump folder.
        """
        job = self.job
        step = self._resume()
        self._precompute()
        tensorboard = job.metrics.enable_tensorboard and dist.get_rank() == 0
        board = self.folder / job.metrics.save_tb_folder if tensorboard else None
        reporter = agree(lambda: Reporter(self.record, job.training.steps, self.device, board))
        unread: list[torch.Tensor] = []
        trace_folder = self.folder / job.profiling.save_traces_folder
        with traces(job.profiling, trace_folder, step) as step_is_done:
            while step < job.training.steps:
                step += 1
                unread.append(self._step(step))
                step_is_done()
                reporter.count_tokens(self.data.tokens_per_step)
                last = step == job.training.steps
                saves = last or step % job.checkpoint.interval == 0
                logs = last or step == 1 or step % job.metrics.log_freq == 0
                validates = self.validator and (last or step % job.validation.freq == 0)
                if logs or saves or validates:
                    self._read(unread)
                if logs:
                    reporter.report(step, self.optimizer.param_groups[0]["lr"])
                if self.validator is not None and validates:
                    reporter.report_validation(step, *timed(self.validator.loss))
                if saves and self.checkpointer is not None:
                    progress = {"data": self.data.state_dict(), **self.record.history()}
                    self.checkpointer.save(step, progress)
        reporter.close()
        if self.checkpointer is not None:
            self.checkpointer.close()
        self._finish()
        return self.record

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; returns this rank's mean loss, the gradient norm and, of a mixture of
        experts, the load of the busiest, on device.

        Nothing here waits for the device: `_read` looks at the numbers when a line is due.
        """
        gathered_before = self.wire.bytes
        set_learning_rate(self.optimizer, self.job, step)
        self.optimizer.zero_grad()
        batches = self.data.next_step()
        total = torch.zeros((), device=self.device)
        for tokens, targets in batches:
            logits = self.model(tokens.to(self.device))
            with loss_context(self.job):
                loss = self.loss(logits, targets.to(self.device)) / len(batches)
                del logits  # backward needs the memory
                loss.backward()
            total += _plain(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job.training.max_norm)
        self.optimizer.step()
        self._precompute()
        self.record.gathered_bytes.append(self.wire.bytes - gathered_before)
        loads = [balance(self.experts)] if self.experts else []
        return torch.stack((total, _plain(norm).to(self.device), *loads))

    def _precompute(self) -> None:
        """All scales of the next step in one all-reduce, if the job gathers in float8."""
        if self.job.precomputes_scales:
            fp8dist.precompute_float8_dynamic_scale_for_fsdp(self.model)

    def _read(self, unread: list[torch.Tensor]) -> None:
        """Move losses, averaged over the ranks, and what goes with them into the record: one
        all-reduce.
        """
        values = torch.stack(unread)
        dist.all_reduce(values)
        losses, norms, *loads = (values / dist.get_world_size()).T.tolist()
        self.record.losses += losses
        self.record.grad_norms += norms
        self.record.expert_loads += loads[0] if loads else []
        unread.clear()

    def _resume(self) -> int:
        """Restore the newest checkpoint; returns the number of steps already done."""
        progress = self.checkpointer.load_newest() if self.checkpointer is not None else None
        if progress is None:
            return 0
        agree(lambda: self.data.load_state_dict(progress["data"]))
        self.record.restore_history(progress)
        step = len(self.record.losses)
        logger.info("resuming after step %d", step)
        if step >= self.job.training.steps:
            logger.warning(
                "nothing is left to train: the checkpoint is of step %d, training.steps is %d",
                step,
                self.job.training.steps,
            )
        return step

    def _finish(self) -> None:
        """Write the record and its picture, and say how it ended."""
        record = self.record

        def write() -> None:
            if dist.get_rank() == 0:
                write_json(record.to_dict(), self.folder / "run.json")
                plot_losses({"loss": record}, self.job.job.description, self.folder / "loss.png")

        agree(write)
        logger.info(record.summary())
        logger.info("wrote %s and %s", self.folder / "run.json", self.folder / "loss.png")


def _plain(number: torch.Tensor) -> torch.Tensor:
    return number.full_tensor() if isinstance(number, DTensor) else number

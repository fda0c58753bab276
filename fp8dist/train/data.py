"""What a job trains on: its documents, tokenizer and stream of batches."""

from fp8dist.train.config import JobConfig
from fp8dist.train.documents import Document, find_documents
from fp8dist.train.packing import PackedDataset, check_batch
from fp8dist.train.tokenizer import Tokenizer, load_tokenizer
from fp8dist.train.worker_loader import WorkerLoader


def find_data(job: JobConfig) -> tuple[list[Document], Tokenizer]:
    """The documents and the tokenizer that `job` names, as this machine has them.

    Raises:
        ValueError: there is no text, or it or the tokenizer cannot be used.
    """
    return find_documents(job.training.text_path), load_tokenizer(job.model.hf_assets_path)


def build_dataset(
    job: JobConfig, documents: list[Document], tokenizer: Tokenizer, *, rank: int, world: int
) -> PackedDataset | WorkerLoader:
    """The stream of batches that `job` trains on, for one of `world` data-parallel ranks.

    Raises:
        ValueError: the global batch cannot be divided among the ranks, or there are worker
            processes and less documents, or no torchdata package.
    """
    training = job.training
    global_batch_size = training.global_batch_size
    if global_batch_size == -1:
        global_batch_size = training.local_batch_size * world
    workers = training.dataloader.num_workers
    if workers > len(documents):
        raise ValueError(
            f"training.dataloader.num_workers is {workers}, more than the {len(documents)} "
            f"documents to share out: set it to at most {len(documents)}"
        )

    def part(worker: int, workers: int) -> PackedDataset:
        return PackedDataset(
            documents[worker::workers],
            tokenizer,
            seq_len=training.seq_len,
            local_batch_size=training.local_batch_size,
            global_batch_size=global_batch_size,
            rank=rank,
            world=world,
            seed=job.debug.seed or 0,
        )

    if not workers:
        return part(0, 1)
    check_batch(global_batch_size, training.local_batch_size, world)
    tokens = global_batch_size * training.seq_len
    return WorkerLoader(training.dataloader, part, tokens)

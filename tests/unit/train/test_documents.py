"""Which documents are found, and the entropies counted over them."""

import json
import math
from pathlib import Path

import pytest

from fp8dist.train.documents import TextDocument, find_documents, reference_entropies


def texts(path: Path) -> list[bytes]:
    return [document.read() for document in find_documents(path)]


def test_folder_of_text_and_jsonl_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.txt").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three é"}\n\n{"text": "four", "id": 4}\n')
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "d.py").write_text("not this")
    (tmp_path / "empty.txt").touch()
    assert texts(tmp_path) == [b"one", b"two", "three é".encode(), b"four"]


def test_single_files(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"\xff any bytes")
    lines.write_text(json.dumps({"text": "no newline at the end"}))
    assert texts(text) == [b"\xff any bytes"]
    assert texts(lines) == [b"no newline at the end"]


def test_default_is_the_standard_library_without_its_tests() -> None:
    documents = find_documents(None)
    names = [document.path.name for document in documents]
    assert {"argparse.py", "subprocess.py", "ast.py"} <= set(names)
    assert not any({"test", "site-packages"} & set(document.path.parts) for document in documents)
    assert sum(document.length for document in documents) > 5_000_000
    assert documents == find_documents(None)
    argparse = documents[names.index("argparse.py")]
    assert argparse.read() == argparse.path.read_bytes()


@pytest.mark.parametrize("name", ["", "empty.txt", "blank.jsonl"])
def test_nothing_to_train_on_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"has no text to train on: .*training\.dataset_path"):
        find_documents(tmp_path / name)


def test_missing_path_and_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_documents(tmp_path / "nowhere")
    other = tmp_path / "data.csv"
    other.write_text("text")
    with pytest.raises(ValueError, match=r"neither a \.txt, \.jsonl or \.parquet"):
        find_documents(other)


@pytest.mark.parametrize("line", ['{"content": "x"}', "[1]", "not json", '{"text": 3}', "3"])
def test_jsonl_without_text_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=r'bad\.jsonl at byte 17 .*"text"'):
        find_documents(path)[1].read()
    path.write_text(line)
    with pytest.raises(ValueError, match="at byte 0"):  # the first is looked at when found
        find_documents(path)


def test_entropies_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    # Over the 8 bytes that follow another: a and b in turn, so the one before tells all.
    path.write_text("ababababa")
    even = reference_entropies([TextDocument(path, 0, 9)])
    assert math.isclose(even.single_bytes, math.log(2))
    assert even.byte_pairs == 0.0
    # aa ab ba aa: after a comes a twice and b once, after b always a.
    path.write_text("aabaa")
    uneven = reference_entropies([TextDocument(path, 0, 5)])
    thirds = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert math.isclose(uneven.byte_pairs, 3 / 4 * thirds)
    assert math.isclose(uneven.single_bytes, -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)))


def test_pairs_do_not_reach_across_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aabb")
    halves = [TextDocument(path, 0, 2), TextDocument(path, 2, 2)]
    # Pairs aa and bb only: the byte before decides. Together with ab it would not.
    assert reference_entropies(halves).byte_pairs == 0.0
    assert reference_entropies([TextDocument(path, 0, 4)]).byte_pairs > 0.1


def test_entropies_of_the_standard_library_are_those_of_source_text() -> None:
    found = reference_entropies(find_documents(None))
    # Python versions differ a little in their text; 3.11 has 3.24 and 2.42.
    assert abs(found.single_bytes - 3.24) < 0.1
    assert abs(found.byte_pairs - 2.42) < 0.1

"""Compact files: what they hold is what a plain file holds, in fewer bytes, and every way in which they can lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from artifact import given_method, unbounded_method
from artifact.educational_decoder import expand
from artifact.examples import (
    Header,
    denses,
    gaussian,
    recipe,
    rewrite,
    rtn,
    rule,
    run,
    same_content,
    save,
    save_folder,
    seal,
    verify,
)
from artifact.golden_cases import mixed
from artifact.test_hostile import refusal
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.compress.plan_checkpoint import plan_checkpoint
from qcompress.errors import CheckpointError
from qcompress.report.gather import gather_report
from qcompress.types.plan import Budget, Recipe, Rule


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    unbounded_method.register(monkeypatch)
    given_method.register(monkeypatch)


def make(folder: Path, choice: str = "auto", *, compact: bool = True, threads: int = 1) -> Path:
    """An artifact with tensors of every form, kept ones and one that is stored as F16."""
    case = mixed(choice)
    source = save(folder / "in.safetensors", case.tensors, {"format": "pt", "note": "x"})
    output = folder / ("compact.safetensors" if compact else "plain.safetensors")
    run(source, output, case.recipe, choice, compact=compact, threads=threads, force=True)
    return output


@pytest.mark.parametrize("choice", ["packed", "auto", "zstd", "ans"])
def test_a_compact_file_holds_what_a_plain_one_holds(choice: str, tmp_path: Path) -> None:
    plain, compact = make(tmp_path, choice, compact=False), make(tmp_path, choice)
    verify(compact)
    state = denses(load_state_dict(plain))
    assert denses(load_state_dict(compact)) == state == expand(compact)
    one, other = gather_report(plain), gather_report(compact)
    assert one.layers == other.layers
    assert other.size.parts.total == compact.stat().st_size
    assert other.size.parts.header < one.size.parts.header / 2
    for path in (plain, compact):
        export(read_artifact(path), path.with_suffix(".dense"), force=False)
    assert plain.with_suffix(".dense").read_bytes() == compact.with_suffix(".dense").read_bytes()
    with safe_open(compact, "pt") as library:
        assert set(library.keys()) == {"qcompress.data", "qcompress.manifest"}
        assert library.metadata() == {"format": "pt", "qcompress": "2"}


def test_a_tensor_takes_at_most_24_bytes_beside_its_codes_and_values(tmp_path: Path) -> None:
    """Names, shapes, checksums, exponents, codings and lengths, of many layers as networks have them."""
    kinds = ("attn.q.weight", "mlp.up.weight", "norm.weight")
    names = [f"model.layers.{number}.{kind}" for number in range(60) for kind in kinds]
    tensors = {
        name: gaussian(16 + index % 3, 12, seed=index) if "norm" not in name else gaussian(12, seed=index)
        for index, name in enumerate(names)
    }
    source = save(tmp_path / "in.safetensors", tensors)
    for choice in ("packed", "ans"):
        sizes = []
        for part in (names[:90], names):
            save(source, {name: tensors[name] for name in part})
            asked, output = rtn(4, "*.[qu]*.weight"), tmp_path / "out.safetensors"
            report = run(source, output, asked, choice, compact=True, force=True)
            sizes.append(report.size.parts.header)
        assert sizes[1] - sizes[0] <= 24 * (len(names) - 90)
        assert sizes[1] <= 24 * len(names)


def test_the_same_bytes_from_one_thread_and_from_three(tmp_path: Path) -> None:
    whole = make(tmp_path).read_bytes()
    assert make(tmp_path, threads=3).read_bytes() == whole


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, case = make(tmp_path).read_bytes(), mixed("auto")
    seen: list[str] = []

    def stop_late(name: str, _: int) -> None:
        seen.append(name)
        if len(seen) == 9:
            raise KeyboardInterrupt

    arguments = (tmp_path / "in.safetensors", tmp_path / "again.safetensors", case.recipe, "auto")
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, compact=True, resume=True, progress=stop_late)
    run(*arguments, compact=True, resume=True)
    assert (tmp_path / "again.safetensors").read_bytes() == whole


def test_every_flipped_bit_is_found_by_every_reader(tmp_path: Path) -> None:
    path = make(tmp_path)
    whole = path.read_bytes()
    container = read_artifact(path).files[0].container
    frame = container.data_start + container.spans["qcompress.manifest"][0]
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        if place >= frame and same_content(damaged[frame:], whole[frame:]):
            # Some bits of a compressed block say nothing.
            verify(path)
            continue
        for read in (verify, load_state_dict, gather_report):
            refusal(path, read)


def test_truncated_at_many_bytes(tmp_path: Path) -> None:
    path = make(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path, read_artifact)


def kept(change: Callable[[Header], object]) -> Callable[[Header, Header, bytearray], None]:
    def apply(_header: Header, manifest: Header, _data: bytearray) -> None:
        change(manifest["kept"])

    return apply


def longer(name: str, by: int) -> Callable[[Header, Header, bytearray], None]:
    def apply(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["numbers"]["lengths"][name] += by

    return apply


def beside(header: Header, _manifest: Header, data: bytearray) -> None:
    header["b"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    data += b"x"


def flipped(_header: Header, _manifest: Header, data: bytearray) -> None:
    data[1] ^= 1


LIES: dict[str, tuple[Callable[[Header, Header, bytearray], object], str]] = {
    "a longer shape": (kept(lambda k: k["F16"].update(bias=[6])), "'qcompress.data' has"),
    "a wider dtype": (kept(lambda k: k.update(F32={"half": k["F16"].pop("half")})), "'qcompress.data' has"),
    "another dtype": (kept(lambda k: k.update(BF16={"half": k["F16"].pop("half")})), "does not hold"),
    "another name": (kept(lambda k: k["F16"].update(bent=k["F16"].pop("half"))), "does not hold"),
    "another shape": (kept(lambda k: k["F16"].update(half=[7, 1])), "does not hold"),
    "an unknown dtype": (kept(lambda k: k.update(F5={"x": [0]})), "a dtype or name that cannot be"),
    "twice": (kept(lambda k: k.update(U8={"half": [0]})), "tensor 'half' is kept twice"),
    "a part's name": (kept(lambda k: k.update(U8={"w.qc.codes": [0]})), "a dtype or name that cannot be"),
    "a compressed tensor": (kept(lambda k: k.update(U8={"w": [0]})), "tensor 'w' stands beside its codes"),
    "shape of text": (kept(lambda k: k.update(U8={"x": ["1"]})), "not a list of numbers"),
    "names a list": (kept(lambda k: k.update(U8=["x"])), "has no object 'U8'"),
    "longer codes": (longer("unbounded.a.qc.codes", 1), "'qcompress.data' has"),
    "a length too many": (lambda _h, m, _d: m["numbers"]["lengths"].update(z=1), "bytes of numbers too many"),
    "a length missing": (lambda _h, m, _d: m["numbers"]["lengths"].popitem(), "lacks the length of a tensor"),
    "a tensor beside": (beside, "its tensors are not just 'qcompress.data' and 'qcompress.manifest'"),
    "plain after all": (lambda _h, m, _d: m.pop("kept"), "bytes of numbers, not"),
    "a flipped bit": (flipped, "the checksum of all kept tensors does not hold"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_compact_file_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    change, what = LIES[name]
    path = rewrite(make(tmp_path), change)
    assert what in refusal(path, load_state_dict)
    refusal(path)


def test_a_sound_file_is_accepted_after_the_same_rewriting(tmp_path: Path) -> None:
    verify(rewrite(make(tmp_path), lambda *_: None))


def test_bytes_of_all_count_where_a_budget_counts_them_and_a_file_is_one(tmp_path: Path) -> None:
    source = read_checkpoint(save(tmp_path / "in.safetensors", {"w": gaussian(6, 10)}))
    shards = {"model.safetensors": {"w": gaussian(6, 10)}}
    folder = read_checkpoint(save_folder(tmp_path / "in", shards))

    def planned(checkpoint: object, budget: Budget | None, compact: bool | None = None) -> bool:
        asked = Recipe("quantize", (Rule("*", "rtn", rtn(4).rules[0].config, "rule"),), budget=budget)
        return plan_checkpoint(checkpoint, asked, compact=compact).compact  # type: ignore[arg-type]

    assert planned(source, Budget(size=1000))
    assert planned(source, Budget(minimize="size"))
    assert not planned(source, Budget(size=1000), False)
    assert not planned(source, Budget(bpw=2.0))
    assert not planned(source, None)
    assert planned(source, None, True)
    assert not planned(folder, Budget(size=1000))


@pytest.mark.parametrize("name", ["qcompress.data", "qcompress.manifest"])
def test_names_of_an_artifact_itself_are_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match="a name that is reserved for artifacts"):
        read_checkpoint(tmp_path / "m.safetensors")


def test_nothing_kept_and_nothing_compressed(tmp_path: Path) -> None:
    for name, tensors, asked in (
        ("none", {"w": gaussian(4, 8)}, rtn(3)),
        ("all", {"w": gaussian(4, 8), "e": torch.empty(0, 3)}, recipe(rule("*"))),
    ):
        run(save(tmp_path / "in.safetensors", tensors), tmp_path / f"{name}.safetensors", asked, compact=True)
        verify(tmp_path / f"{name}.safetensors")
        assert denses(load_state_dict(tmp_path / f"{name}.safetensors")) == expand(tmp_path / f"{name}.safetensors")


def test_sealing_again_is_what_makes_a_change_pass(tmp_path: Path) -> None:
    """A changed bit whose checksum is made right again gives other values, and no error."""
    path = make(tmp_path, "packed")
    before = load_state_dict(path)

    def change(header: Header, manifest: Header, data: bytearray) -> None:
        data[1] ^= 1
        seal(header, manifest, data, "qcompress.data")

    after = load_state_dict(rewrite(path, change))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"bias"}

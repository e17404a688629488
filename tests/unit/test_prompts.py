"""Prompt sets: the owners' formats, the pinned lists, downloads that fail, and which prompts a selection takes."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypersd_bench import download, registry
from hypersd_bench.cli.main import main
from hypersd_bench.download import OwnerFile
from hypersd_bench.errors import InputError
from hypersd_bench.prompt_sets.coco import VAL_2014_10K, VAL_2017_5K
from hypersd_bench.prompt_sets.dpg import DPG
from hypersd_bench.prompt_sets.drawbench import DRAW_BENCH
from hypersd_bench.prompt_sets.geneval import GEN_EVAL
from hypersd_bench.prompt_sets.hpsv2 import HPS_V2
from hypersd_bench.prompt_sets.partiprompts import PARTI_PROMPTS
from hypersd_bench.prompt_sets.t2i_compbench import T2I_COMP_BENCH
from hypersd_bench.prompts import Prompt, PromptSet, PromptSource, load_prompts

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prompt cache of the test's own."""
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "RETRIES", 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # here it is set for all tests
    return tmp_path / "cache" / "prompts"


def small(source: PromptSource, count: int) -> PromptSource:
    """The source as if its owner had published ``count`` prompts, none of them pinned."""
    files = tuple(replace(file, sha256="", git_blob="") for file in source.files)
    return replace(source, count=count, prompts_sha256="", files=files)


# the owners' formats


def annotation(id: int, image_id: int, caption: str) -> dict[str, Any]:
    return {"id": id, "image_id": image_id, "caption": caption}


def coco_json() -> bytes:
    rows = [
        annotation(40, 9, "A later caption."),
        annotation(31, 785, "A skier.\n"),
        annotation(12, 9, " A bowl\nof  food. "),
        annotation(35, 139, "A dining room."),
    ]
    return json.dumps({"images": [], "annotations": rows}).encode()


def test_coco_takes_the_lowest_annotation_of_each_photo_from_json_or_zip(tmp_path: Path) -> None:
    (tmp_path / "captions_val2017.json").write_bytes(coco_json())
    with zipfile.ZipFile(tmp_path / "annotations_trainval2017.zip", "w") as archive:
        archive.writestr("annotations/captions_train2017.json", "{}")
        archive.writestr("annotations/captions_val2017.json", coco_json())
    source = small(VAL_2017_5K, 3)
    texts = ["A bowl of food.", "A dining room.", "A skier."]  # photos 9, 139, 785
    assert [p.text for p in source.load(tmp_path / "captions_val2017.json").prompts] == texts
    assert [p.text for p in source.load(tmp_path / "annotations_trainval2017.zip").prompts] == texts
    assert [p.text for p in source.load(tmp_path).prompts] == texts  # the folder that the zip lies in


def test_coco_lists_of_2014_are_cut_to_their_length(tmp_path: Path) -> None:
    rows = [annotation(i, 100_000 - i, f"Caption {i}.") for i in range(10_005)]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    prompts = VAL_2014_10K.load(tmp_path / "captions_val2014.json").prompts
    assert len(prompts) == 10_000
    assert prompts[0] == Prompt("p00000", "Caption 10004.")
    assert prompts[-1] == Prompt("p09999", "Caption 5.")


def test_partiprompts_keep_their_quotes(tmp_path: Path) -> None:
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        'Prompt\tCategory\tChallenge\tNote\n"G I G G L E"\tIllustrations\tWriting\t\na fox\tAnimals\tBasic\t\n'
    )
    assert small(PARTI_PROMPTS, 2).load(path).prompts == (
        Prompt("p00000", '"G I G G L E"', "Illustrations"),
        Prompt("p00001", "a fox", "Animals"),
    )


def test_drawbench_as_the_sheet_exports_it(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text('"Prompts","Category",""\n"A pear, cut.","Gary Marcus et al. ",""\n"A sign.","Text",""\n')
    assert small(DRAW_BENCH, 2).load(path).prompts == (
        Prompt("p00000", "A pear, cut.", "Gary Marcus et al."),
        Prompt("p00001", "A sign.", "Text"),
    )


def test_geneval_by_tag(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text('{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"}\n')
    assert small(GEN_EVAL, 1).load(path).prompts == (Prompt("p00000", "a photo of two cups", "counting"),)


def test_compbench_reads_windows_line_ends_and_needs_all_files(tmp_path: Path) -> None:
    source = small(T2I_COMP_BENCH, 16)
    for file in source.files:
        name = Path(file.name).name
        (tmp_path / name).write_bytes(f"one of {name}\r\ntwo of {name} \r\n".encode())
    prompts = source.load(tmp_path).prompts
    assert prompts[0] == Prompt("p00000", "one of color_val.txt", "color")
    assert prompts[-1] == Prompt("p00015", "two of complex_val.txt", "complex")
    with pytest.raises(InputError, match=r"needs a folder that holds color_val\.txt, shape_val\.txt"):
        source.load(tmp_path / "color_val.txt")
    (tmp_path / "numeracy_val.txt").unlink()
    with pytest.raises(InputError, match=r"can't read prompts_file .*numeracy_val\.txt"):
        source.load(tmp_path)


def test_dpg_takes_each_item_once_and_leaves_none_out(tmp_path: Path) -> None:
    path = tmp_path / "dpg_bench.csv"
    columns = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question"
    path.write_text(
        f'{columns}\nitem7,"A fox, red.",,1,0,entity,whole,e,Is there a fox?\n'  # the row that the owner's script skips
        'item2,"Two cups.",,1,0,entity,whole,e,Are there cups?\nitem2,"Two cups.",,2,1,other,count,c,Two?\n'
    )
    assert [p.text for p in small(DPG, 2).load(path).prompts] == ["A fox, red.", "Two cups."]


def test_hpsv2_by_style_with_its_duplicates(tmp_path: Path) -> None:
    for style in ("photo", "paintings", "anime", "concept-art"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"a {style}", "the same"]))
    prompts = small(HPS_V2, 8).load(tmp_path).prompts
    assert [p.category for p in prompts[::2]] == ["anime", "concept-art", "paintings", "photo"]
    assert [p.text for p in prompts].count("the same") == 4
    assert len({p.id for p in prompts}) == 8


@pytest.mark.parametrize(
    ("source", "path", "categories"),
    [
        (VAL_2017_5K, "captions/captions_val2017.json", {"": 5000}),
        (PARTI_PROMPTS, "prompts/partiprompts", {"Animals": 314, "World Knowledge": 214}),
        (GEN_EVAL, "prompts/geneval", {"single_object": 80, "two_object": 99, "position": 100}),
        (T2I_COMP_BENCH, "prompts/t2i_compbench", {"color": 300, "3d_spatial": 300, "complex": 300}),
    ],
)
def test_owners_files_are_the_pinned_lists(source: PromptSource, path: str, categories: dict[str, int]) -> None:
    if not (DATA / path).exists():
        pytest.skip("the owners' files are not here")
    found = source.load(DATA / path)
    assert len(found.prompts) == source.count
    assert found.sha256 == source.prompts_sha256
    assert found.license == source.license
    names = [prompt.category for prompt in found.prompts]
    assert {name: names.count(name) for name in categories} == categories
    for owner in source.files:  # the pins of the downloads
        if (file := DATA / path / Path(owner.name).name).is_file():
            owner.check(file)


def test_the_miniatures_lists_never_change() -> None:
    """The hashes that runs of before carry in their manifests."""
    hashes = {name: load_prompts(name).sha256 for name in ("pocket/held-out", "pocket/train")}
    assert hashes == {
        "pocket/held-out": "b4c6a89a4729ff8f7312e761dd040e25ca079836a8fcb27722ca27cce1eae5c5",
        "pocket/train": "3d29fedef1f1e7783149ffbd83e0ccf5898aa81ce4505f4b55ae907662800773",
    }
    with pytest.raises(InputError, match="generated here; leave prompts_file out"):
        load_prompts("pocket/train", file=Path("train.txt"))


# files that are not the owner's


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        (VAL_2017_5K, "captions.json", b"{", r"captions\.json: not a file that coco/2017-val-5k is published in"),
        (VAL_2017_5K, "captions.json", b"{}", "not a file that coco/2017-val-5k"),
        (VAL_2017_5K, "captions.json", b'{"annotations": [1]}', "not a file that coco/2017-val-5k"),
        (DPG, "dpg.csv", b"prompt\na fox\n", "not a file that dpg is published in"),
        (DPG, "dpg_bench.csv", b"item_id,text\n1,a fox\n", "its hash is .*, the pinned one 98457fc9"),
        (GEN_EVAL, "x.jsonl", b'{"prompt": "a fox", "tag": "counting"}', r"x\.jsonl: 1 prompts, but geneval has 553"),
        (GEN_EVAL, "x.jsonl", b'{"prompt": "a fox"}\n' * 553, "not the prompts of geneval .*pinned 7798ffb3"),
        (PARTI_PROMPTS, "none.tsv", None, r"can't read prompts_file .*none\.tsv.* published at https://github\.com"),
    ],
)
def test_another_file_is_refused_in_one_line(
    tmp_path: Path, source: PromptSource, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(source.id, file=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_zip_without_the_captions_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("annotations/instances_val2017.json", "{}")
    with pytest.raises(InputError, match=r"other\.zip: not a file .*captions_val2017\.json"):
        VAL_2017_5K.load(tmp_path / "other.zip")


# downloads


class Owner:
    """A web server that publishes ``files``, fails the first ``failures`` requests and may ``cut`` what it sends."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []
        self.cut = False
        self.failures = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests.append(self.path)
                content = owner.files.get(self.path)
                if len(owner.requests) <= owner.failures:
                    self.send_error(503)
                elif content is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[:20] if owner.cut else content)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        """Nobody listens at the address any more."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


CONTENT = b'{"tag": "counting", "prompt": "a photo of two cups"}\n'
CONTENT_SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def owner() -> Iterator[Owner]:
    server = Owner({"/set.jsonl": CONTENT})
    yield server
    server.close()


def published(url: str, sha256: str = CONTENT_SHA256, git_blob: str = "") -> PromptSource:
    return replace(small(GEN_EVAL, 1), files=(OwnerFile("geneval/set.jsonl", url, sha256, git_blob),))


def test_a_download_is_cached_and_the_owner_may_vanish(owner: Owner, cache: Path) -> None:
    source = published(f"{owner.url}/set.jsonl")
    assert source.state == "to download"
    first = source.load()
    owner.close()
    assert source.state == "cached"
    assert source.load() == first
    assert owner.requests == ["/set.jsonl"]
    assert first.source == f"{owner.url}/set.jsonl (sha256 {CONTENT_SHA256})"
    assert [path.name for path in (cache / "geneval").iterdir()] == ["set.jsonl"]


def test_a_cached_file_that_was_damaged_comes_again(owner: Owner, cache: Path) -> None:
    source = published(f"{owner.url}/set.jsonl")
    first = source.load()
    (cache / "geneval" / "set.jsonl").write_bytes(CONTENT[:20])
    assert source.load() == first
    assert len(owner.requests) == 2


def test_a_file_of_unknown_hash_is_taken_and_its_hash_recorded(owner: Owner) -> None:
    assert CONTENT_SHA256 in published(f"{owner.url}/set.jsonl", sha256="").load().source


def test_a_failed_try_is_repeated(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRIES", 1)
    owner.failures = 1
    assert published(f"{owner.url}/set.jsonl").load().prompts[0].text == "a photo of two cups"
    assert len(owner.requests) == 2


def assert_refused(source: PromptSource, cache: Path, *parts: str) -> None:
    """One line that names the address and the remedy, and nothing left in the cache."""
    with pytest.raises(InputError) as caught:
        source.load()
    message = str(caught.value)
    assert "\n" not in message
    for part in (source.files[0].url, "--prompts-file", "prompts_file", *parts):
        assert part in message
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert source.state == "to download"


def test_a_missing_file_is_named(owner: Owner, cache: Path) -> None:
    assert_refused(published(f"{owner.url}/gone.jsonl"), cache, "HTTP 404")


def test_a_download_that_breaks_off_is_not_kept(owner: Owner, cache: Path) -> None:
    owner.cut = True
    assert_refused(published(f"{owner.url}/set.jsonl", sha256=""), cache, "it broke off")


def test_a_page_in_place_of_an_unpinned_file_is_not_kept(owner: Owner, cache: Path) -> None:
    source = published(f"{owner.url}/set.jsonl", sha256="")
    owner.files["/set.jsonl"] = b"<html>come back later</html>"
    with pytest.raises(InputError, match=r"set\.jsonl, line 1"):
        source.load()
    owner.files["/set.jsonl"] = CONTENT + CONTENT
    with pytest.raises(InputError, match=rf"{owner.url}/set\.jsonl: 2 prompts, but geneval has 1"):
        source.load()
    assert source.state == "to download"
    owner.files["/set.jsonl"] = CONTENT
    assert source.load().prompts


def test_an_owner_that_cannot_be_reached_is_named(owner: Owner, cache: Path) -> None:
    owner.close()
    assert_refused(published(f"{owner.url}/set.jsonl"), cache, "can't connect")


def test_offline_nobody_is_asked(owner: Owner, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published(f"{owner.url}/set.jsonl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(source, cache, "is not here yet, and HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    whole = source.load()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert source.load() == whole  # from the cache


def test_another_hash_names_both(owner: Owner, cache: Path) -> None:
    assert_refused(published(f"{owner.url}/set.jsonl", "0" * 64), cache, CONTENT_SHA256, "0" * 64)


def test_gits_id_of_a_file_is_a_pin_too(owner: Owner, cache: Path) -> None:
    blob = "c4d61de5981193a7b362ba9fd3a2dc7c0ac25d27"  # git hash-object
    assert_refused(published(f"{owner.url}/set.jsonl", "", "0" * 40), cache, blob, "0" * 40)
    assert published(f"{owner.url}/set.jsonl", "", blob).load().prompts


def test_a_cache_that_cannot_be_written_is_named(owner: Owner, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    with pytest.raises(InputError, match=r"can't write .*set HYPERSD_BENCH_CACHE"):
        published(f"{owner.url}/set.jsonl").load()


# selection


def numbered(count: int) -> PromptSet:
    return PromptSet("set", tuple(Prompt(f"p{i:05d}", f"text {i}") for i in range(count)))


def test_a_drawn_order_is_that_of_the_keys() -> None:
    """The order of ``printf '7\\tp00000' | b2sum -l 128`` for p00000 to p00007."""
    drawn = numbered(8).select(8, "random", 7)
    assert [int(p.id[1:]) for p in drawn.prompts] == [1, 3, 2, 5, 7, 4, 0, 6]
    assert all(p.text == f"text {int(p.id[1:])}" for p in drawn.prompts)


@pytest.mark.parametrize("selection", ["first", "random"])
def test_a_larger_count_extends_a_smaller_one(selection: Any) -> None:
    whole = numbered(100)
    small_one, large = whole.select(10, selection, 3), whole.select(60, selection, 3)
    assert large.prompts[:10] == small_one.prompts
    assert (small_one.of, small_one.selection) == (100, selection)
    assert whole.select(10, selection, 3) == small_one
    assert set(whole.select(None, selection, 3).prompts) == set(whole.prompts)


def test_another_seed_draws_others() -> None:
    whole = numbered(100)
    assert set(whole.select(50, "random", 1).prompts) != set(whole.select(50, "random", 2).prompts)


def test_the_whole_list_in_order_is_the_list() -> None:
    assert numbered(5).select(None, "first", 3) == numbered(5)


@pytest.mark.parametrize("count", [0, 6])
def test_prompts_that_are_not_there_cannot_be_selected(count: int) -> None:
    with pytest.raises(InputError, match=f"has 5 prompts; {count} were asked for"):
        numbered(5).select(count, "random", 0)


def test_the_hash_is_of_ids_and_texts_alone() -> None:
    listed = PromptSet("a", (Prompt("p00000", "a fox", "animals"), Prompt("p00001", "a car")), "here", "MIT")
    assert listed.sha256 == hashlib.sha256(b"p00000\ta fox\np00001\ta car").hexdigest()


# anybody's files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'Caption,category\n"a fox, red",animals\n,none\na car,\n'),
        ("a.tsv", "text\tcategory\na fox, red\tanimals\na car\n"),
        ("a.jsonl", '{"text": "a fox, red", "category": "animals"}\n\n{"text": "a car"}\n'),
        ("a.json", '[{"prompt": "a  fox, red", "category": "animals"}, "a car"]'),
    ],
)
def test_tables_of_all_kinds(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = load_prompts(name, tmp_path)
    assert found.prompts == (Prompt("p00000", "a fox, red", "animals"), Prompt("p00001", "a car"))
    assert found.source == f"{name} (sha256 {hashlib.sha256(content.encode()).hexdigest()})"


def test_parquet(tmp_path: Path) -> None:
    columns = {"image": [b"x", b"y"], "text": ["a", "b"], "prompt": ["a fox", "a car"], "category": ["animals", None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert load_prompts("a.parquet", tmp_path).prompts == (
        Prompt("p00000", "a fox", "animals"),
        Prompt("p00001", "a car"),
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: .*must be one JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"word": "b"}\n', "a.jsonl, line 2: no text under 'prompt'"),
        ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl, line 1: no text under 'prompt'"),
        ("a.jsonl", b"", "holds no prompt"),
        ("a.json", b'["a",\n"b"', "a.json, line 2: .*must be a JSON list"),
        ("a.json", b'{"prompt": "a"}', "must be a JSON list, not one dict"),
        ("a.json", b'["a", null]', "entry 2: no text under"),
        ("a.json", b"[]", "holds no prompt"),
        ("a.csv", b"prompt\n", "holds no prompt"),
        ("a.csv", b"prompt\n" + b"x" * 200_000, "a.csv, after line 1: field larger than field limit"),
        ("a.parquet", b"PAR1 no PAR1", "is not a parquet file"),
        ("b.parquet", None, "can't read prompt file .*b.parquet"),
    ],
)
def test_a_broken_file_gets_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_parquet_without_a_prompt_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column 'prompt' or 'caption' or 'text'"):
        load_prompts("a.parquet", tmp_path)


def test_a_file_goes_with_a_name_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a fox\n")
    with pytest.raises(InputError, match=r"a\.txt is a file already"):
        load_prompts("a.txt", tmp_path, tmp_path / "a.txt")


# the list


def test_list_prompts_downloads_nothing(
    owner: Owner, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = replace(published(f"{owner.url}/set.jsonl"), id="toy", note="for a test")
    monkeypatch.setattr("hypersd_bench.prompt_sets.geneval.GEN_EVAL", source)
    assert main(["list", "prompts", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(listed) == {*registry.rows("prompts"), "toy"} - {"geneval"}
    assert listed["toy"]["state"] == "to download"
    assert listed["toy"]["files"][0]["sha256"] == CONTENT_SHA256
    assert listed["pocket/train"]["state"] == "built in"
    assert owner.requests == []
    assert not cache.exists()
    source.load()
    assert main(["list", "prompts"]) == 0
    assert "toy                1      cached" in capsys.readouterr().out

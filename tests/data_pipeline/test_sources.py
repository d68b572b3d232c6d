"""What a source lists: everything in it is a clip, a clip that failed, or ignored by kind."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.plan.rows import failure_before_opening
from landiff.data_pipeline.ingest.sources.entries import IgnoredFiles, TarFile
from landiff.data_pipeline.ingest.sources.listing import list_source
from landiff.data_pipeline.ingest.sources.report import summarize_source
from tests.data_pipeline.ingest_helpers import shards_config

UTF8_BOM = b"\xef\xbb\xbf"


def listed(
    source: Path | str, **changes: object
) -> tuple[dict[str, list[str]], dict[str, str], dict[str, str]]:
    """By name: captions of clips, reasons of rejected clips, kinds of ignored files."""
    settings = shards_config(source, **changes)
    listing = list_source(settings)
    clips, rejected, ignored = {}, {}, {}
    for entry in listing.entries():
        for one in listing.members(entry) if isinstance(entry, TarFile) else [entry]:
            if isinstance(one, IgnoredFiles):
                ignored[one.name] = one.kind
                continue
            failure = failure_before_opening(settings, one)
            if failure:
                rejected[one.name] = failure.reason
            else:
                clips[one.name] = [one.caption, *one.more_captions]
    return clips, rejected, ignored


def fill(folder: Path, **files: str | bytes) -> Path:
    """Write files; "__" in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(
            data.encode() if isinstance(data, str) else data
        )
    return folder


def test_several_sources_are_read_one_after_the_other(tmp_path):
    fill(tmp_path / "a", one__mp4="x", one__txt="first")
    make_tar(tmp_path / "b.tar", [("two.mp4", b"y"), ("two.txt", b"second")])
    sources = (str(tmp_path / "a"), str(tmp_path / "b.tar"), "packaged")
    settings = shards_config("packaged").model_copy(update={"source": sources})
    captions = [clip.caption for clip in list_source(settings).clips()]
    packaged = [clip.caption for clip in list_source(shards_config("packaged")).clips()]
    assert captions == ["first", "second", *packaged] and len(packaged) > 40
    missing = settings.model_copy(update={"source": (*sources, str(tmp_path / "c"))})
    with pytest.raises(ConfigError, match="c' does not exist"):
        list_source(missing)


def make_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def detail_of(source: Path | str, name: str) -> str:
    settings = shards_config(source)
    for clip in list_source(settings).clips():
        if clip.name == name:
            return failure_before_opening(settings, clip).detail
    raise AssertionError(name)


# ----------------------------------------------------------------------------------------- folders


def test_files_that_no_clip_uses_are_ignored_by_kind(tmp_path: Path) -> None:
    source = fill(
        tmp_path / "in",
        a__mp4="v",
        a__txt="used",
        b__mp4__part="v",
        c__tar__gz="z",
        d__tgz="z",
        e__zip="z",
        f__webp="i",
        g__PNG="i",
        README="x",
        h__txt="no video",
        Thumbs__db="x",
        captions__json="[]",
    )
    for name in (".DS_Store", "._a.mp4", ".hidden"):
        (source / name).write_text("x")
    clips, rejected, ignored = listed(source)
    assert clips == {"a.mp4": ["used"]} and rejected == {}
    assert ignored == {
        "b.mp4.part": ".part",
        "c.tar.gz": ".tar.gz",
        "d.tgz": ".tgz",
        "e.zip": ".zip",
        "f.webp": ".webp",
        "g.PNG": ".png",
        "README": "no_suffix",
        "h.txt": ".txt",
        "Thumbs.db": ".db",
        "captions.json": ".json",
        ".DS_Store": "hidden_file",
        "._a.mp4": "macos_metadata",
        ".hidden": "hidden_file",
    }


def test_links_to_folders_are_followed_once_and_loops_are_named(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", b__mp4="v", b__txt="stored")
    source = fill(tmp_path / "in", a__mp4="v", a__txt="here")
    fill(source / "sub", c__mp4="v", c__txt="below")
    (source / "one").symlink_to(store)
    (source / "two").symlink_to("../store")
    (source / "loop").symlink_to(".")
    (source / "sub" / "up").symlink_to(tmp_path)
    (source / "again").symlink_to("sub")
    (store / "back").symlink_to("../in")
    clips, rejected, ignored = listed(source)
    assert clips == {"a.mp4": ["here"], "one/b.mp4": ["stored"], "sub/c.mp4": ["below"]}
    assert rejected == {}
    assert ignored == {
        "two/": "repeated_link",
        "loop/": "link_loop",
        "sub/up/": "link_loop",
        "again/": "repeated_link",
        "one/back/": "repeated_link",
    }


def test_what_cannot_be_opened_is_rejected_by_name(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", a__mp4="v", a__txt="fine", pipetext__mp4="v")
    (source / "gone.mp4").symlink_to("not_there.mp4")
    (source / "self.mp4").symlink_to("self.mp4")
    (source / "notes.doc").symlink_to("not_there.doc")
    os.mkfifo(source / "pipe.mp4")
    os.mkfifo(source / "pipe.log")
    os.mkfifo(source / "pipetext.txt")
    (source / "link.tar").symlink_to("nowhere.tar")
    clips, rejected, ignored = listed(source)
    assert clips == {"a.mp4": ["fine"]}
    assert rejected == {
        "gone.mp4": "unreadable_file",
        "self.mp4": "unreadable_file",
        "pipe.mp4": "unreadable_file",
        "link.tar": "unreadable_file",
        "pipetext.mp4": "unreadable_caption",
    }
    assert ignored == {"notes.doc": "dangling_link", "pipe.log": "special_file"}


def test_folders_that_cannot_be_read_are_rejected_by_name(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", a__mp4="v", a__txt="fine")
    (source / "sub").mkdir()
    deep = source / "sub"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chmod(deep, 0)
            for folder in (tmp_path, *list(tmp_path.parents)[:3]):
                os.chmod(folder, 0o755)
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may read everything
            os.write(write, json.dumps(listed(source)).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        clips, rejected, _ = json.loads(file.read())
    assert clips == {"a.mp4": ["fine"]}
    assert rejected == {"sub/": "unreadable_folder"}


def test_captions_are_found_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    source = fill(
        tmp_path / "in",
        **{
            "a__MP4": "v",
            "a__TXT": "upper",
            "b__mp4": "v",
            "b__caption": "other suffix",
            "c__mp4": "v",
            "c__webm": "v2",
            "c__txt": "shared",
            "c__1__mp4": "v3",
            "c__1__txt": "own",
            "d__mp4": "v",
            "d__json": '{"caption": ["one", "two"]}',
        },
    )
    clips, rejected, ignored = listed(source)
    assert clips == {
        "a.MP4": ["upper"],
        "b.mp4": ["other suffix"],
        "c.mp4": ["shared"],
        "c.webm": ["shared"],
        "c.1.mp4": ["own"],
        "d.mp4": ["one", "two"],
    }
    assert rejected == {} and ignored == {}


def test_empty_text_does_not_hide_the_next_caption(tmp_path: Path) -> None:
    files = {
        "a.mp4": b"v",
        "a.txt": b" \n",
        "a.json": b'{"caption": "from json"}',
        "b.mp4": b"w",
        "b.txt": b"from text",
        "b.json": b"{}",
    }
    source = fill(
        tmp_path / "in", **{name.replace(".", "__"): data for name, data in files.items()}
    )
    clips, _, ignored = listed(source)
    assert clips == {"a.mp4": ["from json"], "b.mp4": ["from text"]}
    assert ignored == {"a.txt": ".txt", "b.json": ".json"}
    tar = make_tar(tmp_path / "x.tar", list(files.items()))
    clips, _, ignored = listed(tar)
    assert clips == {"x.tar:a": ["from json"], "x.tar:b": ["from text"]}
    assert ignored == {"x.tar:a.txt": ".txt", "x.tar:b.json": ".json"}


def test_clips_beside_tars_are_used(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", b__mp4="v", b__txt="loose")
    make_tar(source / "a.tar", [("k.mp4", b"v"), ("k.txt", b"in a tar")])
    make_tar(source / "c.TAR", [("k.mp4", b"v"), ("k.txt", b"in another")])
    assert listed(source)[0] == {
        "a.tar:k": ["in a tar"],
        "b.mp4": ["loose"],
        "c.TAR:k": ["in another"],
    }


# --------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (UTF8_BOM + b"eins zwei\r\n", "eins zwei"),
        ("Mädchen".encode(), "Mädchen"),
        ("Mädchen".encode("latin-1"), None),
        ("Mädchen".encode("utf-16"), None),
        ("Mädchen".encode("utf-16-be"), None),
        ("abc".encode("utf-16-le"), None),
        ("abc".encode("utf-32"), None),
        (b"a\0b", None),
        (b"cut \xc3", None),
    ],
)
def test_captions_are_utf8_or_rejected_in_every_source(
    tmp_path: Path, data: bytes, expected: str | None
) -> None:
    folder = fill(tmp_path / "in", a__mp4="v", a__txt=data)
    tar = make_tar(tmp_path / "x.tar", [("a.mp4", b"v"), ("a.txt", data)])
    for source, name in ((folder, "a.mp4"), (tar, "x.tar:a")):
        clips, rejected, _ = listed(source)
        if expected is None:
            assert (clips, rejected) == ({}, {name: "caption_encoding"})
            assert detail_of(source, name).startswith("a.txt: ")
        else:
            assert (clips, rejected) == ({name: [expected]}, {})


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_are_utf8_or_refused(tmp_path: Path, suffix: str) -> None:
    delimiter = "\t" if suffix == "tsv" else ","
    text = f"file{delimiter}caption\na.mp4{delimiter}Mädchen\n"
    if suffix == "jsonl":
        text = '{"file": "a.mp4", "caption": "Mädchen"}\n'
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(UTF8_BOM + text.encode())
    assert listed(path)[0] == {"a.mp4": ["Mädchen"]}
    for encoding, message in (
        ("latin-1", r"not UTF-8 text \(line"),
        ("utf-16", "byte order mark of UTF-16"),
        ("utf-16-le", "NUL bytes"),
        ("utf-32", "byte order mark of UTF-32"),
    ):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match=rf"t\.{suffix}.*{message}"):
            listed(path)


# ------------------------------------------------------------------------------------------ tables


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,caption\na.mp4,a man, in a red hat, walks\n",
            "line 2 has 4 fields, the header names 2 columns.*double quotes",
        ),
        (
            'file,caption\na.mp4,"one\nb.mp4,two\n',
            "line 2: a double quote is opened here and never closed",
        ),
        (
            'file,caption\na.mp4,"one\nb.mp4,"two"\n',
            "line 2: a closing double quote is followed by text",
        ),
        (
            'file,caption\na.mp4,"one\nb.mp4,two\nc.mp4,"\n',
            "line 2: a quoted text spans lines that are rows",
        ),
        ('file,caption\na.mp4,"He said "hi" there"\n', "line 2: a closing double quote"),
        ("file,caption\na.mp4,one\nb.mp4\n", "line 3 has 1 fields"),
        ("file,caption,caption\na.mp4,one,two\n", "column 'caption' occurs twice"),
        (
            "File,Text\na.mp4,one\n",
            "no column 'file', there are 'File', 'Text'; name it with columns.file=",
        ),
        ("id\ttext\na.mp4\tone, two\n", "no column 'file', there are 'id', 'text'; name it"),
        ("file,caption\na.mp4,nul\0byte\n", "NUL bytes"),
        ("file,caption,start_s\na.mp4,one,soon\n", "start_s = 'soon' is not a time"),
    ],
)
def test_damaged_csv_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(table(tmp_path / "t.csv", text))


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_csv_with_other_delimiters_is_read(tmp_path: Path, delimiter: str) -> None:
    rows = (
        "\ufefffile| caption|\r\n",
        'a.mp4|"one, two; three"|\r\n',
        "\r\n",
        'b.mp4|"two\nlines"|\r\n',
    )
    text = "".join(rows).replace("|", delimiter)
    assert listed(table(tmp_path / "t.csv", text))[0] == {
        "a.mp4": ["one, two; three"],
        "b.mp4": ["two\nlines"],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.mp4", "caption": "cut', "line 2 is not JSON.*the file ends within this line"),
        (
            '{"file": "a.mp4", "caption": "a", "caption": "b"}\n',
            "line 2 has the key 'caption' twice",
        ),
        ("[" * 100_000 + "\n", "line 2 is not JSON"),
        ('{"file": "a.mp4", "caption": ' + "1" * 5000 + "}\n", "line 2 "),
        ('{"file": "a.mp4", "caption": "x", "start_s": true}\n', "start_s = True is not a time"),
        ('{"file": "a.mp4", "caption": "x", "end_s": NaN}\n', "end_s = nan is not a time"),
    ],
)
def test_damaged_jsonl_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed(table(tmp_path / "t.jsonl", '{"file": "first.mp4", "caption": "fine"}\n' + line))


def test_captions_of_other_types_are_rejected(tmp_path: Path) -> None:
    values = {
        "nan": float("nan"),
        "object": {"en": "x"},
        "true": True,
        "number": 7,
        "nested": ["a", ["b"]],
        "mixed": ["a", 1],
        "infinite": float("inf"),
        "null": None,
        "blank": "\ufeff \n",
        "list": ["a", None, " ", "b"],
        "literal": "['a', \"it's\"]",
        "json": '["a", "b"]',
        "numbers": "[1, 2]",
        "music": "[Music]",
        "half": "[a man, 'x'",
    }
    rows = [{"file": f"{name}.mp4", "caption": value} for name, value in values.items()] + [
        {"file": 7, "caption": "x"},
        {"file": "", "caption": "x"},
    ]
    path = table(tmp_path / "t.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    clips, rejected, _ = listed(path)
    assert clips == {
        "list.mp4": ["a", "b"],
        "literal.mp4": ["a", "it's"],
        "json.mp4": ["a", "b"],
        "music.mp4": ["[Music]"],
        "half.mp4": ["[a man, 'x'"],
    }
    wrong = ("nan", "object", "true", "number", "nested", "mixed", "infinite", "numbers")
    assert rejected == {f"{name}.mp4": "caption_type" for name in wrong} | {
        "null.mp4": "empty_caption",
        "blank.mp4": "empty_caption",
        "t.jsonl:31": "no_file_name",
        "t.jsonl:33": "no_file_name",
    }
    assert (
        detail_of(path, "true.mp4")
        == "line 5: the boolean true is not a caption; give text or a list of texts"
    )
    tar = make_tar(
        tmp_path / "x.tar",
        [
            ("a.mp4", b"v"),
            ("a.json", b'{"caption": NaN}'),
            ("b.mp4", b"v"),
            ("b.json", b'{"caption": {"en": "x"}}'),
            ("c.mp4", b"v"),
            ("c.json", b'{"text": "x"}'),
            ("d.mp4", b"v"),
            ("d.txt", b"['one', 'two']"),
        ],
    )
    assert listed(tar)[:2] == (
        {"x.tar:d": ["one", "two"]},
        {"x.tar:a": "caption_type", "x.tar:b": "caption_type", "x.tar:c": "empty_caption"},
    )
    assert detail_of(tar, "x.tar:c") == "c.json has no key 'caption', it has: text"


def test_rows_of_panda_70m_give_a_clip_for_each_span(tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.csv",
        "videoID,url,timestamp,caption,matching_score\n"
        "v.mp4,http,\"[['0:00:01.500', '0:00:08.900'], ['0:01:00.000', '0:01:02.000']]\","
        '"[\'A man, walking.\', ""It\'s a dog.""]","[0.4, 0.5]"\n'
        "w.mp4,http,2020-01-01,\"['only one']\",[0.1]\n",
    )
    clips = list(list_source(shards_config(path, columns={"file": "videoID"})).clips())
    assert [(clip.name, clip.caption, clip.start_s, clip.end_s) for clip in clips] == [
        ("v.mp4", "A man, walking.", 1.5, 8.9),
        ("v.mp4", "It's a dog.", 60.0, 62.0),
        ("w.mp4", "only one", 0.0, float("inf")),
    ]
    table(path, "file,timestamp,caption\nv.mp4,\"[['0:00', '0:01']]\",\"['a', 'b']\"\n")
    with pytest.raises(ConfigError, match="line 2: timestamp has 1 spans, caption 2 captions"):
        listed(path)


def test_rows_of_one_span_that_follow_each_other_are_one_clip(tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.csv",
        "file,caption,start_s\na.mp4,one,\na.mp4,two,\na.mp4,later,3\na.mp4,two,3\na.mp4,two,3\n",
    )
    clips = list(list_source(shards_config(path)).clips())
    assert [(clip.caption, clip.more_captions, clip.start_s, clip.line) for clip in clips] == [
        ("one", ("two",), 0.0, 2),
        ("later", ("two",), 3.0, 4),
        ("two", (), 3.0, 6),
    ]


def test_two_tables_in_a_folder_are_refused(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", captions__csv="file,caption\n", captions__jsonl="", a__mp4="v")
    with pytest.raises(
        ConfigError, match=r"captions\.csv and captions\.jsonl; name the one to use"
    ):
        listed(source)


def test_files_that_the_table_of_a_folder_does_not_name_are_ignored_by_kind(tmp_path: Path) -> None:
    source = fill(
        tmp_path / "in",
        captions__csv="file,caption\n./a.mp4,one\nsub/../b.mp4,two\n",
        a__mp4="v",
        b__mp4="v",
        c__mp4="v",
        d__tar="",
        e__txt="x",
    )
    clips, _, ignored = listed(source)
    assert list(clips) == ["./a.mp4", "sub/../b.mp4"]
    assert ignored == {"c.mp4": "unlisted_video", "d.tar": ".tar", "e.txt": ".txt"}


def test_missing_targets_are_named_with_a_hint(tmp_path: Path) -> None:
    rows = "".join(f"v{number},x\n" for number in range(5))
    path = table(tmp_path / "t.csv", f"file,caption\n{rows}there.mp4,x\n")
    (tmp_path / "there.mp4").touch()
    (tmp_path / "v0.mp4").touch()
    summary = str(summarize_source(shards_config(path)))
    assert summary == (
        "1 clips; rejected: 5 unreadable_file (v0: no such file; there is v0.mp4: give names of "
        "files with their suffix; v1: no such file; v2: no such file; ...); ignored: none"
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", gzip.compress(b"file,caption\n", mtime=0), "t.csv is a gzip archive"),
        ("t.jsonl", b"<!DOCTYPE html><html>", "t.jsonl is an HTML page"),
        ("t.csv", b"version https://git-lfs.github.com/spec/v1\n", "t.csv is a Git LFS pointer"),
        ("t.csv", b"", "holds no videos"),
        ("t.zip", b"PK\3\4", "is compressed"),
        ("t.tar.gz", b"\x1f\x8b", "is compressed"),
        ("video.mp4", b"v", "for single videos give the folder"),
    ],
)
def test_sources_that_are_something_else_are_named(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path / name)


def test_missing_tars_are_counted_and_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", [("a.mp4", b"v")])
    with pytest.raises(
        ConfigError, match=r"9 of 10 tars do not exist: .*1\.tar, .*2\.tar, .*3\.tar, \.\.\."
    ):
        listed(f"{tmp_path}/{{0..9}}.tar")


# -------------------------------------------------------------------------------------------- tars


def test_keys_of_tars_end_at_the_last_dot(tmp_path: Path) -> None:
    names = (
        "clip 2.0 (x)",
        "clip 2.1 (x)",
        "plain",
        "dir.v1/a.b.c",
        "/abs/p",
        "../../up",
        "./here",
        "x" * 300,
        "ü",
    )
    members = [
        (f"{name}{suffix}", data.encode())
        for name in names
        for suffix, data in ((".MP4", "v"), (".TXT", f"of {name}"))
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar = make_tar(
            tmp_path / "a.tar",
            [
                *members,
                ("notes.md", b"x"),
                ("._plain.mp4", b"x"),
                ("plain.wav", b"x"),
                ("lonely.txt", b"x"),
            ],
            form,
        )
        clips, rejected, ignored = listed(tar)
        assert clips == {f"a.tar:{name}": [f"of {name}"] for name in names}
        assert rejected == {}
        assert ignored == {
            "a.tar:notes.md": ".md",
            "a.tar:._plain.mp4": "macos_metadata",
            "a.tar:plain.wav": ".wav",
            "a.tar:lonely.txt": ".txt",
        }


def test_names_that_occur_twice_in_a_tar_are_rejected(tmp_path: Path) -> None:
    tar = make_tar(
        tmp_path / "a.tar",
        [
            ("a.mp4", b"1"),
            ("a.txt", b"first"),
            ("a.mp4", b"22"),
            ("a.txt", b"second"),
            ("a.webm", b"3"),
        ],
    )
    clips, rejected, ignored = listed(tar)
    assert clips == {"a.tar:a": ["first"], "a.tar:a.webm": ["first"]}
    assert rejected == {"a.tar:a.mp4": "duplicate_name"}
    assert ignored == {"a.tar:a.txt": "duplicate_name"}
    sizes = [clip.video.size for clip in list_source(shards_config(tar)).clips()]
    assert sizes == [1, 1, -1]


def test_links_and_special_members_of_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:

        def add(
            name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", target: str = ""
        ) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), target
            tar.addfile(info, io.BytesIO(data))

        add("dir", tarfile.DIRTYPE)
        add("dir/a.mp4", data=b"video")
        add("dir/a.txt", data=b"caption")
        add("b.mp4", tarfile.LNKTYPE, target="dir/a.mp4")
        add("b.txt", tarfile.SYMTYPE, target="dir/a.txt")
        add("dir/c.mp4", tarfile.SYMTYPE, target="../later.mp4")
        add("dir/c.txt", data=b"third")
        add("evil.mp4", tarfile.SYMTYPE, target="/etc/passwd")
        add("device.mp4", tarfile.CHRTYPE)
        add("evil.txt", tarfile.SYMTYPE, target="/etc/passwd")
        add("later.mp4", data=b"later")
    clips, rejected, ignored = listed(path)
    assert clips == {"a.tar:dir/a": ["caption"], "a.tar:b": ["caption"], "a.tar:dir/c": ["third"]}
    assert rejected == {
        "a.tar:evil.mp4": "unreadable_member",
        "a.tar:device.mp4": "unreadable_member",
        "a.tar:later": "empty_caption",
    }
    assert ignored == {"a.tar:evil.txt": "unreadable_member"}


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"<!doctype html><html>" + b" " * 2000, "not_a_tar", "it is an HTML page"),
        (gzip.compress(b"x" * 9000, mtime=0), "not_a_tar", "it is a gzip archive"),
        (b"", "not_a_tar", "it is an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "not_a_tar",
            "it is a Git LFS pointer",
        ),
        (b"noise" * 1000, "damaged_tar", "ReadError"),
    ],
)
def test_files_named_tar_that_are_something_else_are_named(
    tmp_path: Path, data: bytes, reason: str, detail: str
) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert listed(tmp_path / "a.tar") == ({}, {"a.tar": reason}, {})
    assert detail_of(tmp_path / "a.tar", "a.tar").startswith(detail)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a", "b")
    (tmp_path / "a.tar").write_bytes(packed.getvalue())
    assert detail_of(tmp_path / "a.tar", "a.tar") == "it is a zip archive"


def test_appended_tars_are_read_and_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    one = make_tar(tmp_path / "one.tar", [("a.mp4", b"v"), ("a.txt", b"one")]).read_bytes()
    two = make_tar(tmp_path / "two.tar", [("b.mp4", b"v"), ("b.txt", b"two")]).read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(one + two)
    assert listed(path) == ({"x.tar:a": ["one"], "x.tar:b": ["two"]}, {}, {})
    whole = bytearray(
        make_tar(
            tmp_path / "three.tar",
            [("a.mp4", b"v"), ("a.txt", b"one"), ("b.mp4", b"v"), ("b.txt", b"two")],
        ).read_bytes()
    )
    whole[2048 : 2048 + 100] = bytes([255]) * 100  # the header of b.mp4
    path.write_bytes(whole)
    assert listed(path) == ({"x.tar:a": ["one"]}, {"x.tar": "damaged_tar"}, {})
    path.write_bytes(one[: 1024 + 512 + 2])  # within the caption
    assert listed(path)[1] == {"x.tar:a": "truncated", "x.tar": "damaged_tar"}
    with tarfile.open(path, "w"):
        pass
    assert listed(path) == ({}, {}, {"x.tar": "empty_tar"})


def test_headers_of_a_tar_are_bounded(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.mp4", b"v"), ("a.txt", b"fine")])
    data = path.read_bytes()[:2048]
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, 1 << 30
        path.write_bytes(data + info.tobuf(tarfile.GNU_FORMAT))
        os.truncate(path, (1 << 30) + 10_240)  # sparse on disk
        clips, rejected, _ = listed(path)
        assert clips == {"a.tar:a": ["fine"]}
        assert rejected == {"a.tar": "damaged_tar"}
        assert "headers of a member take more than 1048576 bytes" in detail_of(path, "a.tar")
    info.type, info.size = tarfile.REGTYPE, -512  # would lead back to itself for ever
    path.write_bytes(data + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert listed(path)[1] == {"a.tar": "damaged_tar"}

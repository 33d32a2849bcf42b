"""Files that others wrote: pictures of every make are read or refused in one line, archives and JSON are
whole or named."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import JPEGLosslessSV1

from valor.data.images import ImageError, check_image, open_dicom, read_image
from valor.data.sources import DataError, Fault, read_openi_tree, read_own_table, read_r2gen
from valor.data.studies import sound_images
from valor.testing import write_dicom

RAMP = np.tile(np.linspace(0, 4095, 64).round().astype(np.uint16), (48, 1))


def dicom(path, values=RAMP, photometric="MONOCHROME2", **changes):
    write_dicom(path, values, photometric)
    ds = open_dicom(path)
    for name, value in changes.items():
        ds.add_new(name, "US", value) if name.startswith("PixelPadding") else setattr(ds, name, value)
    ds.save_as(path)
    return path


def picture(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80), np.uint8)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize("kind, extra", [("JPEG", 1000), ("JPEG", 100_000), ("PNG", 100), ("PNG", 100_000)])
@pytest.mark.parametrize("full", [False, True])
def test_what_follows_a_whole_picture_does_not_matter(kind, extra, full):
    data = picture(kind)
    check_image(data + bytes(extra), full)
    assert (read_image(data + bytes(extra)) == read_image(data)).all()


@pytest.mark.parametrize(
    "orientation, turned",
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_a_picture_is_turned_as_its_exif_tag_says(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG"):
        assert (read_image(picture(kind, exif=exif)) == turned(read_image(picture(kind)))).all(), kind


def test_a_window_without_width_is_ignored(tmp_path):
    plain = read_image(dicom(tmp_path / "a.dcm"))
    for width in (0, -5, ""):
        assert (read_image(dicom(tmp_path / "b.dcm", WindowCenter=2000, WindowWidth=width)) == plain).all(), (
            width
        )
    assert (
        read_image(dicom(tmp_path / "c.dcm", WindowCenter=60000, WindowWidth=10)) == plain
    ).all()  # it would leave one value
    check_image(tmp_path / "b.dcm", full=True)
    assert (read_image(dicom(tmp_path / "d.dcm", WindowCenter=1000, WindowWidth=500)) != plain).any()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, dict(WindowCenter=1127, WindowWidth=256)])
def test_padding_is_black_and_does_not_take_the_range(photometric, window, tmp_path):
    values = np.tile(np.linspace(1000, 1255, 256).round().astype(np.uint16), (32, 1))
    framed = np.pad(values, 20, constant_values=4095)
    got = read_image(dicom(tmp_path / "a.dcm", framed, photometric, PixelPaddingValue=4095, **window))
    inside = got[20:-20, 20:-20]
    assert (
        len(np.unique(inside)) >= 250
        and (inside == read_image(dicom(tmp_path / "b.dcm", values, photometric, **window))).all()
    )
    assert (got[:20] == 0).all() and (got[:, -20:] == 0).all()


def test_a_range_of_padding(tmp_path):
    values = RAMP.copy()
    values[:10], values[10:20] = 4000, 4095
    got = read_image(dicom(tmp_path / "a.dcm", values, PixelPaddingValue=4000, PixelPaddingRangeLimit=4095))
    assert (got[:20] == 0).all() and got[20:].max() == 255


def test_a_palette_is_looked_up(tmp_path):
    table = np.linspace(65535, 0, 256).round().astype("<u2")  # a negative: index 0 is white
    path = dicom(tmp_path / "a.dcm", np.tile(np.arange(256, dtype=np.uint16), (8, 1)), "PALETTE COLOR")
    ds = open_dicom(path)
    for colour in ("Red", "Green", "Blue"):
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        ds.add_new(f"{colour}PaletteColorLookupTableData", "OW", table.tobytes())
    ds.save_as(path)
    got = read_image(path)[0]
    assert got[0] == 255 and got[-1] == 0 and (np.diff(got.astype(int)) <= 0).all()


def test_colour_of_eight_and_sixteen_bits(tmp_path):
    for dtype, bits, scale in ((np.uint8, 8, 1), (np.uint16, 16, 257)):
        rgb = np.repeat((np.arange(256) * scale).astype(dtype)[None, :, None], 3, 2).repeat(4, 0)
        path = dicom(tmp_path / "a.dcm", np.zeros((4, 256), np.uint16), "MONOCHROME2")
        ds = open_dicom(path)
        ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.PlanarConfiguration = "RGB", 3, 0
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit, ds.PixelData = bits - 1, rgb.tobytes()
        ds.save_as(path)
        assert (read_image(path)[0] == np.arange(256)).all()


def test_a_dicom_file_without_its_preamble_or_head(tmp_path):
    whole = dicom(tmp_path / "a.dcm").read_bytes()
    bare = whole[132:]  # begins with the file head, group 2
    head = 12 + int.from_bytes(bare[8:12], "little")
    for data in (bare, bare[head:]):
        check_image(data, full=True)
        check_image(data)
        assert (read_image(data) == read_image(whole)).all()
        with pytest.raises(ImageError, match="cut off|not readable as DICOM"):
            check_image(data[:-500])


def test_a_compression_that_needs_a_package_names_it(tmp_path):
    from pydicom.encaps import encapsulate

    path = dicom(tmp_path / "a.dcm")
    ds = open_dicom(path)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = JPEGLosslessSV1, encapsulate([bytes(100)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)
    for check in (read_image, check_image):
        with pytest.raises(
            ImageError, match="a.dcm: compressed as JPEG Lossless.* pip install pylibjpeg .*gdcm"
        ):
            check(path)


@pytest.mark.parametrize("name", ["x" * 5000 + ".png", "a\0b.png", "\ud83d.png"])
def test_a_path_that_no_file_can_have_is_refused_as_a_missing_image_is(name):
    for read in (read_image, check_image):
        with pytest.raises(ImageError, match="expected a PNG, JPEG or DICOM file"):
            read(name)


# ---- archives, tables and JSON, through the readers of studies
# ------------------------------------------------------------------------------


def openi_archive(path, n=40, odd=()):
    "NLMCXR_reports.tgz of `n` made-up reports, with members of the types `odd`."
    with tarfile.open(path, "w:gz") as tar:
        for i in range(1, n + 1):
            xml = (
                f'<r><uId id="CXR{i}"/><AbstractText Label="FINDINGS">No effusion '
                f'{i * 7}.</AbstractText><major>normal</major><parentImage id="CXR{i}_1"/></r>'
            ).encode()
            member = tarfile.TarInfo(f"ecgen-radiology/{i}.xml")
            member.size = len(xml)
            tar.addfile(member, io.BytesIO(xml))
        for i, kind in enumerate(odd):
            member = tarfile.TarInfo(f"odd{i}.xml")
            member.type, member.linkname = kind, "absent.xml"
            tar.addfile(member)
    return path


def test_an_archive_with_a_flipped_bit_is_refused_or_gives_the_same_studies(tmp_path):
    path = openi_archive(tmp_path / "NLMCXR_reports.tgz")
    whole, good = list(read_openi_tree(tmp_path)), path.read_bytes()
    refused = 0
    for bit in np.random.default_rng(0).choice(len(good) * 8, 100, replace=False):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        studies, error = [], ""
        try:
            for s in read_openi_tree(tmp_path):
                studies.append(s)
        except DataError as e:
            error = str(e)
        if error:
            assert (
                not studies
                and "NLMCXR_reports.tgz: not readable as a tar archive, or damaged" in error
                and "\n" not in error
            )
        else:
            assert studies == whole
        refused += bool(error)
    assert refused > 90


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.97])
@pytest.mark.parametrize("packed", [True, False])
def test_a_cut_archive_is_refused_before_a_study_is_taken(keep, packed, tmp_path):
    path = openi_archive(tmp_path / "NLMCXR_reports.tgz")
    data = path.read_bytes() if packed else gzip.decompress(path.read_bytes())[: 41 * 1024]
    path.write_bytes(data[: int(len(data) * keep) // 512 * 512 if not packed else int(len(data) * keep)])
    with pytest.raises(DataError, match="NLMCXR_reports.tgz.*(damaged|changed)"):
        next(read_openi_tree(tmp_path))


def test_members_that_are_no_files_cost_one_listed_fault_each(tmp_path):
    openi_archive(
        tmp_path / "NLMCXR_reports.tgz",
        5,
        [
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.DIRTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
        ],
    )
    found = list(read_openi_tree(tmp_path))
    faults = [f for f in found if isinstance(f, Fault)]
    assert len(found) - len(faults) == 5 and len(faults) == 6 and {f.kind for f in faults} == {"no file"}


def test_the_package_s_own_archive_is_whole():
    from valor.data.benchmarks import openi_archive as installed
    from valor.files import check_archive

    assert check_archive(installed()) > 3900


def test_an_image_name_of_5000_letters_costs_its_image(tmp_path):
    (tmp_path / "ecgen-radiology").mkdir()
    (tmp_path / "ecgen-radiology" / "1.xml").write_text(
        f'<r><uId id="CXR1"/><AbstractText Label="FINDINGS">Clear.</AbstractText><parentImage '
        f'id="CXR1_1_IM-0001-{"1" * 5000}"/></r>'
    )
    (study,) = read_openi_tree(tmp_path)
    good, faults = sound_images(study)
    assert not good and [f.kind for f in faults] == ["missing image"]


ROWS = [
    dict(image="a.png", findings="clear lungs.", impression="normal.", study_id=f"s{i}") for i in range(4)
]


def jsonl(path, lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return list(read_own_table(path))


def test_jsonl_with_a_mark_packed_or_with_odd_line_ends_is_read(tmp_path):
    lines = [json.dumps(r | dict(findings="clear.\u2028 No\u2029 effusion\x85.\x0b")).encode() for r in ROWS]
    lines[1] = json.dumps(ROWS[1] | dict(findings="clear.\u2028 effusion"), ensure_ascii=False).encode()
    for name, data in {
        "a.jsonl": b"\xef\xbb\xbf" + b"\r\n".join(lines),
        "b.jsonl.gz": gzip.compress(b"\n\n".join(lines)),
        "c.jsonl": gzip.compress(b"\n".join(lines)),
    }.items():
        (tmp_path / name).write_bytes(data)
        studies = list(read_own_table(tmp_path / name))
        assert [s.study_id for s in studies] == ["s0", "s1", "s2", "s3"] and studies[
            1
        ].findings == "clear.\u2028 effusion", name


BROKEN = {
    r'{"image": "a.png", "findings": "x \ud83d"}': "half a surrogate pair",
    '{"image": "a.png", "findings": "caf\xe9"}': "not UTF-8",
    "[" * 2000 + "]" * 2000: "nested too deep",
    "[" * 200_000: "nested too deep",
    '{"a":' * 50_000: "nested too deep",
    "{": "not JSON",
    "1" * 5000: "limit",
}


@pytest.mark.parametrize("line", BROKEN, ids=BROKEN.values())
def test_a_broken_line_costs_its_row_and_is_named(line, tmp_path):
    lines = [json.dumps(r).encode() for r in ROWS]
    found = jsonl(tmp_path / "a.jsonl", lines[:2] + [line.encode("latin-1")] + lines[2:])
    fault = next(f for f in found if isinstance(f, Fault))
    assert (
        len(found) == 5
        and fault.kind == "broken JSON"
        and fault.where.endswith("a.jsonl:3")
        and BROKEN[line] in fault.message
        and "\n" not in fault.message
    )


def test_annotation_with_a_mark_is_read_and_brackets_without_end_are_refused(tmp_path):
    path = tmp_path / "annotation.json"
    entry = dict(id="CXR1", report="clear.", image_path=["CXR1/0.png"])
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(dict(train=[entry, None, [1, [2]], 3], val=[])).encode())
    found = list(read_r2gen(tmp_path, False))
    assert [getattr(f, "kind", "study") for f in found] == [
        "study",
        "not an entry",
        "not an entry",
        "not an entry",
    ]
    for text, says in {
        "[" * 200_000: "nested deeper",
        '{"train": ' + '{"a":' * 100_000: "nested deeper",
        '{"train": [' + json.dumps(entry | dict(report="x \ud83d")) + "]}": "annotation.json:1: holds half",
        '{"train": [' + json.dumps(entry)[:-3]: "not readable as JSON",
        "": "not readable as JSON",
        "[[1]]": "no splits",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            list(read_r2gen(tmp_path, False))
    path.write_bytes(json.dumps(dict(train=[entry])).replace("clear", "caf\xe9").encode("latin-1"))
    with pytest.raises(DataError, match="annotation.json: not readable as JSON"):
        list(read_r2gen(tmp_path, False))


def test_tables_with_a_mark_are_read_and_broken_ones_are_named(tmp_path):
    path, head = tmp_path / "a.csv", "image,findings,impression,study_id\n"
    row = 'a.png,"clear,\nlungs.",normal.,{}\n'
    path.write_bytes(b"\xef\xbb\xbf" + (head + "".join(row.format(f"s{i}") for i in range(3))).encode())
    assert [s.study_id for s in read_own_table(path)] == ["s0", "s1", "s2"]
    path.write_text(head + row.format("s0") + "a.png,x\0y,z,s1\n" + "a.png,x\n" + row.format("s2"))
    assert [getattr(s, "kind", s.study_id) for s in read_own_table(path)] == [
        "s0",
        "wrong number of cells",
        "wrong number of cells",
        "s2",
    ]
    path.write_bytes((head + row.format("s0") + row.format("caf\xe9")).encode("latin-1"))
    with pytest.raises(DataError, match="a.csv: not readable as CSV in UTF-8"):
        list(read_own_table(path))
    path.write_text(
        head + row.format("s0") + 'a.png,"never closed,normal.,s1\n' + row.format("s2").replace('"', "") * 3
    )
    with pytest.raises(DataError, match="a.csv:4: a quotation mark opens in this row and never closes"):
        list(read_own_table(path))


# ---- files of reports, and files that we go on with
# ------------------------------------------------------------------------------------------

LINES = [
    dict(id="a", candidate="clear.\u2028 No effusion.", reference="clear."),
    dict(id="b", candidate="", reference="edema."),
]


def readers():
    "Everything that reads a file of reports, as functions of its path that return {id: candidate}."
    from valor.metrics import evaluate
    from valor.results import gallery, zeroshot

    yield "evaluate", lambda p: dict(evaluate.read_reports(p)[["id", "candidate"]].itertuples(index=False))
    yield "gallery", lambda p: gallery.read_lines(p)[0]
    yield (
        "zeroshot",
        lambda p: dict(zeroshot.from_file(p, ["a", "b"])[0][["id", "candidate"]].itertuples(index=False)),
    )


def test_every_reader_of_reports_reads_and_refuses_the_same(tmp_path):
    lines = [json.dumps(x, ensure_ascii=False).encode() for x in LINES]
    for name, read in readers():
        for file, data in {
            "a.jsonl": b"\xef\xbb\xbf" + b"\r\n".join(lines),
            "a.jsonl.gz": gzip.compress(b"\n\n".join(lines)),
        }.items():
            (tmp_path / file).write_bytes(data)
            assert read(tmp_path / file) == {x["id"]: x["candidate"] for x in LINES}, name
        for line, says in BROKEN.items():
            (tmp_path / "b.jsonl").write_bytes(lines[0] + b"\n" + line.encode("latin-1") + b"\n" + lines[1])
            with pytest.raises(DataError, match=f"b.jsonl:2: .*{says}") as e:
                read(tmp_path / "b.jsonl")
            assert "\n" not in str(e.value) and len(str(e.value)) < 500, name
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines))[:-9])
        with pytest.raises(DataError, match="b.jsonl.gz"):
            read(tmp_path / "b.jsonl.gz")


def goers_on():
    "Everything that goes on with a file of lines that it wrote: functions of its path."
    from valor.metrics import evaluate
    from valor.results import zeroshot
    from valor.train import preference

    yield "scores", lambda p: evaluate.kept_scores(p, "key")
    yield "samples", lambda p: preference.whole_lines(p, 2)
    yield "answers", lambda p: zeroshot.kept_answers(p, dict(model="m"))
    yield "answers, to be counted", lambda p: zeroshot.answers_in(p, dict(model="m"))


@pytest.mark.parametrize(
    "text",
    ["my notes without a line's end", "my notes\nof two lines", '{"mine": 1}\n', "{", "[" * 100_000 + "\n"],
)
def test_a_file_that_is_not_ours_is_refused_and_stays(text, tmp_path):
    from valor.policy.generate import begin_or_go_on

    path = tmp_path / "notes.jsonl"
    settings = dict(model="m", weights="w", max_new_tokens=8, size=None)
    for name, go_on in [*goers_on(), ("reports", lambda p: begin_or_go_on(p, settings))]:
        path.write_text(text)
        if text == "{" and name != "reports":
            continue  # what a killed process may have left of a first line
        with pytest.raises(ValueError, match="notes.jsonl.*nothing was changed"):
            go_on(path)
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path], name


def test_reports_go_on_with_the_same_model_and_settings_alone(tmp_path):
    from valor.policy.generate import begin_or_go_on

    path, settings = tmp_path / "out.jsonl", dict(model="m", weights="w", max_new_tokens=8, size=None)
    assert begin_or_go_on(path, settings) == set()
    path.write_text('{"id": "a", "report": "x"}\n{"id": "b", "rep')
    assert begin_or_go_on(path, settings | dict(model="another name of it")) == {"a"}
    kept = path.read_text()
    assert kept == '{"id": "a", "report": "x"}\n'
    for change, says in (
        (dict(weights="v", model="n"), "weights 'w', now 'v' .model 'm', now 'n'"),
        (dict(max_new_tokens=9), "max_new_tokens 8, now 9"),
        (dict(size=336), "size None, now 336"),
    ):
        with pytest.raises(ValueError, match=f"out.jsonl: was made with {says}"):
            begin_or_go_on(path, settings | change)
    assert path.read_text() == kept
    path.write_text("")  # an empty file is a new one
    assert begin_or_go_on(path, settings | dict(size=336)) == set()


def test_a_torn_last_line_is_cut_off_and_whole_ones_are_kept(tmp_path):
    from valor.config import key_of
    from valor.metrics import evaluate
    from valor.results import zeroshot
    from valor.train import preference

    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "k"}\n{"pair": "p", "x": 1}\n{"pair": "q", "x"')
    assert evaluate.kept_scores(path, "k") == {"p": dict(x=1)} and path.read_text().endswith('"x": 1}\n')
    assert evaluate.kept_scores(path, "other") == {} and path.with_suffix(".old").exists()
    path.write_text('{"row": 1}\n{"row": 2}\n{"row": 3}\n{"ro')
    assert preference.whole_lines(path, 2) == 2 and path.read_text() == '{"row": 1}\n{"row": 2}\n'
    tag, line = key_of(dict(model="m")), dict(id="a", key="k", status="ok", candidate="x\u2028")
    path.write_text(json.dumps(dict(settings=tag, **line)) + "\n" + '{"settings": "')
    assert len(zeroshot.answers_in(path, dict(model="m"))) == 1 and path.read_text().endswith(
        '"'
    )  # looks, and changes nothing
    assert list(zeroshot.kept_answers(path, dict(model="m"))[0]) == ["k"] and path.read_text().endswith("}\n")

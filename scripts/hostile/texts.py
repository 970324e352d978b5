"""Hostile tables, class lists, image lists and XML files."""

from __future__ import annotations

from collections.abc import Iterator

from scripts.hostile.cases import ONE, Bench, Data, HostileFile, Must
from scripts.hostile.formats import directory, linked, pipe
from scripts.hostile.material import TINY_FLAGS


def _bytes(text: str | Data) -> Data:
    return text.encode() if isinstance(text, str) else text


def good_table(bench: Bench) -> str:
    """A labels.csv of four images."""
    return "file,classes\n" + "".join(f"2025_{n:06}.jpg,{bench.tag}\n" for n in range(1, 5))


def table_cases(bench: Bench) -> Iterator[HostileFile]:
    """Cases of labels.csv."""
    tag, table = bench.tag, good_table(bench)
    rows: dict[str, str | Data] = {
        "climbing name": f"{table}../../../../etc/passwd,{tag}\n",
        "absolute name": f"{table}/etc/passwd,{tag}\n",
        "backslash climbing": f"{table}..\\..\\x.jpg,{tag}\n",
        "drive": f"{table}C:\\x.jpg,{tag}\n",
        "NUL in a name": f"{table}a\0b.jpg,{tag}\n",
        "control characters": f"{table}a\x1b[2J\x07b.jpg,{tag}\n",
        "newline in quotes": f'{table}"a\nb.jpg",{tag}\n',
        "quote left open": f'{table}"a.jpg,{tag}\n',
        "name of 5000 letters": f"{table}{'x' * 5000}.jpg,{tag}\n",
        "cell of 300 KB": f"{table}{'x' * 300000},{tag}\n",
        "class of 300 KB": f"{table}a.jpg,{'y' * 120000}\n",
        "unknown class": table.replace(tag, "dragon", 1),
        "twice": f"{table}2025_000001.jpg,{tag}\n",
        "UTF-16": table.encode("utf-16"),
        "Latin-1": f"{table}\xe4.jpg,".encode("latin-1"),
        "only a header": "file,classes\n",
        "only commas": ",,,\n,,\n",
        "three columns": f"{table}a.jpg,b,c\n",
        "100000 columns": f"file,{','.join(f'c{i}' for i in range(100000))}\n",
        "300000 lines": table + "".join(f"i{n}.jpg,{tag}\n" for n in range(300000)),
        "wide, cell is 2": f"file,{tag}\n2025_000001.jpg,2\n",
        "wide, cell is nan": f"file,{tag}\n2025_000001.jpg,nan\n",
        "decomposed letters": f"{table}a\u0308.jpg,{tag}\n\u00e4.jpg,{tag}\n",
        "name is .": f"{table}.,{tag}\n",
        "name is an existing folder": f"{table}../photos,{tag}\n",
        "links out of the folder": linked("/etc/hostname"),
        "CR line ends (any)": table.replace("\n", "\r"),
        "a link to /dev/zero": linked("/dev/zero"),
    }
    for name, text in rows.items():
        must: Must = "any" if name.endswith("(any)") else "refuse"
        build = bench.in_folder("labels.csv", _bytes(text))
        yield HostileFile("labels.csv", name, "prepare", bench.prepare_folder, build, must, "labels.csv")


def class_list_cases(bench: Bench) -> Iterator[HostileFile]:
    """Cases of classes.txt."""
    tag, other = bench.tag, bench.names[1]
    rows: list[tuple[str, str | bytes, Must]] = [
        ("300 classes", "".join(f"c{i}\n" for i in range(300)), "refuse"),
        ("twice", f"{tag}\n{tag}\n", "refuse"),
        ("background", f"background\n{tag}\n", "refuse"),
        ("an empty line", f"{tag}\n\n{other}\n", "refuse"),
        ("semicolon", f"{tag};x\n", "refuse"),
        ("UTF-16", "\n".join(bench.names).encode("utf-16"), "refuse"),
        ("NUL", f"{tag}\n\0\n", "any"),
        ("name of 100 KB", f"{tag}\n" + "x" * 100000 + "\n", "any"),
        ("form feed and line separators", f"{tag}\x0c{other}\u2028z\n", "any"),
        ("order swapped", "\n".join(reversed(bench.names)), "any"),
        ("empty", "", "refuse"),
        ("binary", bytes(range(256)), "refuse"),
    ]
    for name, text, must in rows:
        build = bench.in_folder("classes.txt", _bytes(text))
        yield HostileFile("classes.txt", name, "prepare", bench.prepare_folder, build, must, "classes.txt")
    argv = [*bench.evaluate_masks, "--classes", "c.txt"]
    yield HostileFile("classes.txt", "binary (evaluation)", "evaluation.py", argv,
               bench.in_evaluation("c.txt", bytes(range(256))), "refuse", "c.txt")  # fmt: skip


def list_cases(bench: Bench) -> Iterator[HostileFile]:
    """Lists of images, read by evaluation.py and by prepare voc12."""
    rows: list[tuple[str, str | Data, Must]] = [
        ("climbing", f"{ONE}\n../../../etc/passwd\n", "refuse"),
        ("absolute", "/etc/passwd\n", "any"),
        ("NUL", f"{ONE}\0\n", "refuse"),
        ("twice", f"{ONE}\n{ONE}\n", "refuse"),
        ("empty", "", "refuse"),
        ("binary", bytes(range(256)), "refuse"),
        ("UTF-16", ONE.encode("utf-16"), "refuse"),
        ("one line of 5 MB", "x" * 5_000_000, "refuse"),
        ("unknown image", f"{ONE}\nnobody\n", "refuse"),
        ("a link to /dev/zero", linked("/dev/zero"), "refuse"),
        ("a folder", directory, "refuse"),
    ]
    for name, text, must in rows:
        data = _bytes(text)
        yield HostileFile("list", f"{name} (evaluation)", "evaluation.py", bench.evaluate_masks,
                   bench.in_evaluation("d/ImageSets/Segmentation/train.txt", data), must)  # fmt: skip
        yield HostileFile("list", f"{name} (prepare voc12)", "prepare", bench.prepare_voc,
                   bench.in_voc("voc/ImageSets/Segmentation/val.txt", data), must)  # fmt: skip


def good_xml(bench: Bench) -> str:
    """Annotations of the image ONE."""
    return (bench.sample / "Annotations" / f"{ONE}.xml").read_text()


def xml_cases(bench: Bench) -> Iterator[HostileFile]:
    """Annotations of VOC."""
    xml = good_xml(bench)
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    named = "<annotation><object><name>{}</name></object></annotation>"
    laughs = f'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a0 "ha">{entities}]>{named.format("&a9;")}'
    blow_up = f'<!DOCTYPE l [<!ENTITY a "{"x" * 50000}">]>{named.format("&a;" * 5000)}'
    utf_7 = '<?xml version="1.0" encoding="utf-7"?>+ADw-!DOCTYPE+AD4-<annotation/>'
    file = 'SYSTEM "file:///etc/hostname"'
    rows: list[tuple[str, str | Data, Must]] = [
        ("billion laughs", laughs, "refuse"),
        ("billion laughs in UTF-16", laughs.encode("utf-16"), "refuse"),
        ("quadratic blow-up", blow_up, "refuse"),
        ("external entity", f"<!DOCTYPE l [<!ENTITY a {file}>]>{named.format('&a;')}", "refuse"),
        ("external DTD", f"<!DOCTYPE l {file}><annotation/>", "refuse"),
        ("UTF-8 said to be UTF-7", utf_7, "any"),
        ("200000 elements deep", f"<annotation>{'<a>' * 200000}{'</a>' * 200000}</annotation>", "any"),
        ("no names", "<annotation><object/><object><name/></object></annotation>", "any"),
        ("name of 10 MB", named.format("x" * 10_000_000), "any"),
        ("attribute twice", '<annotation a="1" a="2"/>', "refuse"),
        ("cut", xml[: len(xml) // 2], "refuse"),
        ("empty", "", "refuse"),
        ("Latin-1", xml.replace("VOC2012", "\xe4").encode("latin-1"), "refuse"),
        ("NUL", xml.replace("VOC2012", "\0"), "refuse"),
        ("two roots", xml + xml, "refuse"),
        ("unknown name", xml.replace(f"<name>{bench.tag}", "<name>dragon"), "any"),
        ("a named pipe", pipe, "refuse"),
    ]
    place = f"voc/Annotations/{ONE}.xml"
    for name, text, must in rows:
        yield HostileFile("XML", name, "prepare", bench.prepare_voc, bench.in_voc(place, _bytes(text)), must, ONE)
    data = ["--data", "voc12", "--root", "voc"]
    argv = ["seam", *data, *TINY_FLAGS, "--machine.workers", "0", "--steps", "1", "--out", "n"]
    build = bench.in_voc(place, laughs.encode())
    yield HostileFile("XML", "billion laughs (run)", "run_sample.py", argv, build, "refuse", ONE)


def all_text_cases(bench: Bench) -> Iterator[HostileFile]:
    """Tables, class lists, lists and XML."""
    for make in (table_cases, class_list_cases, list_cases, xml_cases):
        yield from make(bench)



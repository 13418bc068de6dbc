"""Hosts from hostfiles, lists and SLURM: what is read, and what is refused with which words."""

from __future__ import annotations

import os
import random
import re
import time

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.hosts import Host, allocated_hosts, parse_hosts, read_hostfile


def _hosts(*pairs):
    return tuple(Host(name=name, slots=slots) for name, slots in pairs)


def _read(folder, content):
    path = folder / "hostfile"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_hostfile(path)


def _names(word):
    return [host.name for host in parse_hosts([word])]


# -- hostfiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("worker-1 slots=4\nworker-2 slots=8\n", [("worker-1", 4), ("worker-2", 8)]),
        ("a\nb", [("a", None), ("b", None)]),
        ("b\na\n", [("b", None), ("a", None)]),
        ("a slots=8 max_slots=8", [("a", 8)]),
        ("a max-slots=9 slots=8", [("a", 8)]),
        ("a slots = 2   max_slots= 4", [("a", 2)]),
        ("a:8\nb:1", [("a", 8), ("b", 1)]),
        ("# all\n\n  \t\na slots=1 # the first\n#b\nc#d\n", [("a", 1), ("c", None)]),
        ("\ta\tslots=2\t\r\nb \r\n", [("a", 2), ("b", None)]),
        (b"\xef\xbb\xbfa\n", [("a", None)]),
        ("# Köln\na", [("a", None)]),
        ("me@a slots=2\nme@b:3", [("me@a", 2), ("me@b", 3)]),
        ("n[1-2,4] slots=2", [("n1", 2), ("n2", 2), ("n4", 2)]),
        ("n[1-2]:4", [("n1", 4), ("n2", 4)]),
        ("me@n[09-10]", [("me@n09", None), ("me@n10", None)]),
        ("fd00::1 slots=2\n::8", [("fd00::1", 2), ("::8", None)]),
        ("[fd00::1]\n[fd00::2]:4", [("fd00::1", None), ("fd00::2", 4)]),
        (
            "me@[fe80::1%eth0]:4\nme@fe80::2%eth0",
            [("me@fe80::1%eth0", 4), ("me@fe80::2%eth0", None)],
        ),
        ("192.0.2.7:2", [("192.0.2.7", 2)]),
        ("a slots=0004", [("a", 4)]),
        ("A_b.Example.org.", [("A_b.Example.org.", None)]),
    ],
)
def test_a_hostfile_is_read(tmp_path, content, expected):
    assert _read(tmp_path, content) == _hosts(*expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host; it has one a line. Write lines such as 'node1 slots=8'"),
        ("# nothing\n\n", "names no host"),
        ("a slots=x", "line 1: slots is 'x'; it is a whole number from 1 to 4096. Write the number"),
        ("a\nb slots=0", "line 2: slots is '0'"),
        ("a slots=-1", "slots is '-1'"),
        ("a slots=", "slots is ''"),
        ("a slots=２", "slots is '２'"),
        ("a slots=4097", "slots is '4097'"),
        ("a slots=" + "9" * 5000, r"slots is '9{77}\.\.\.'"),
        ("a:x", "the count after ':' is 'x'"),
        ("a:", "the count after ':' is ''"),
        ("a slot=8", "line 1: 'slot' is not known; known are slots, max_slots, max-slots. Did you mean s"),
        ("a SLOTS=8", "'SLOTS' is not known.* Did you mean slots?"),
        ("a gpus=8", r"'gpus' is not known.*\. Leave it out\."),
        ("a slots=1 slots=1", "slots stands twice"),
        ("a max_slots=1 slots=1 max-slots=1", "max_slots stands twice"),
        ("a:2 slots=2", "slots=2 stands beside ':2'"),
        ("a slots=8 max_slots=4", "max_slots is 4, but slots is 8"),
        ("a max_slots=4", "max_slots is 4, but slots is not given"),
        ("a 8", "'8' stands after the host; .*Write slots=8"),
        ("a b", "'b' stands after the host; .* One host a line"),
        ("slots=8", "'slots=8' is no host"),
        ("a\n\n# x\na", "line 4: 'a' is named already at line 1; each host is named once.* Drop one"),
        ("a\nme@A. slots=1", "line 2: 'me@A.' is named already at line 1, as 'a'"),
        ("fd00::1\n[FD00:0::1]:4", "'FD00:0::1' is named already at line 1, as 'fd00::1'"),
        ("n[1-4]\nn3", "line 2: 'n3' is named already at line 1"),
        ("n[1,1]", "line 1: 'n1' is named already at line 1"),
        (b"a\nb\xff\n", "line 2: byte 0xff is not UTF-8; .*Save it as UTF-8"),
        ("a\nb\x00", r"line 2: 'b\\x00' is no host"),
        ("a\rb", r"'a\\rb' is no host"),
        ("a\u00a0b", r"'a\\xa0b' is no host"),
        ("x" * 256, r"'x{77}\.\.\.' is no host"),
        ("n[1-4096]\nm", "line 2: 'm' is one host too many; a job has at most 4096"),
        ("#" * ((1 << 20) + 1), "has more than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_a_bad_hostfile_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        _read(tmp_path, content)
    assert str(caught.value).startswith(f"hostfile '{tmp_path}/hostfile'")


def test_a_hostfile_that_cannot_be_read(tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            read_hostfile(path)
        return str(caught.value)

    assert "cannot be read: No such file or directory. Give the path" in message(tmp_path / "x")
    assert "is not a file" in message(tmp_path)
    assert "cannot be read: embedded null byte" in message(tmp_path / "a\0b")
    # It would wait for a writer.
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in message(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read: Too many levels" in message(tmp_path / "loop")


# -- lists --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("n[1-4]", ["n1", "n2", "n3", "n4"]),
        # In the order written: the first host is node 0.
        ("n[3,1]", ["n3", "n1"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[1,01]", ["n1", "n01"]),
        ("n[0-10/5]", ["n0", "n5", "n10"]),
        ("r[1-2]n[3-4]-ib", ["r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib"]),
        ("r[1-2][3-4]", ["r13", "r14", "r23", "r24"]),
        # ClusterShell's NodeSet makes 94 hosts of it, n18 to n111.
        ("n1[8-11]", ["n18", "n19", "n110", "n111"]),
        ("n[8-10]5.x", ["n85.x", "n95.x", "n105.x"]),
        ("[1-2]n", ["1n", "2n"]),
        ("10.0.0.[9-10]", ["10.0.0.9", "10.0.0.10"]),
        ("me@n[1-2]", ["me@n1", "me@n2"]),
        ("[fd00::1]", ["fd00::1"]),
    ],
)
def test_a_word_is_expanded(word, names):
    assert _names(word) == names


def test_a_list_keeps_its_order():
    assert parse_hosts(["b", "a[2-3]", "a1"]) == _hosts(
        ("b", None), ("a2", None), ("a3", None), ("a1", None)
    )


@pytest.mark.parametrize(
    "word",
    [
        "", " ", "a b", "a\tb", "a\n", "a\r", "\x1b[31m", "-oProxyCommand=x", "-a", ".a", "a@-b",
        "-a@b", "me@-n[1-2]", "-n[1-2]", "a;b", "a|b", "a&b", "a$b", "$(id)", "`id`", "'a'", '"a"',
        "a\\b", "a/b", "a~b", "a(b", "a<b", "a{1,2}", "a=b", "a+b", "a%b", "é", "a\u202eb", "a\ud800",
        "@group", "@a:b", "@*", "a@b@c", "@", "a@", "n*", "n?", "a,b", "a!b", "n[1-4]!n2", "a^b",
        "n[1-4],m", "n[1-4]&n[2-3]", "n[", "n]", "n]1[", "n[1", "n[]", "n[1-]", "n[-1]", "n[a-b]",
        "n[1-2-3]", "n[1--3]", "n[1,]", "n[,1]", "n[4-1]", "n[1-4/0]", "n[01-100]", "n[[1-2]]", "n[1 ,2]",
        "n[1-2]%eth0", "n[@g]", "n[１-２]", "%s[1-2]", "host:8", "n[1-2]:8", "a:b:c", ":", "::1::2",
        "fd00::1]", "[fd00::1", "[fd00::1]:8", "fd00::g", "fe80::1%", "fe80::1%e;x", "fe80::1%a b",
        "::1%%a", "[a]", "[::ffff:1.2.3.999]", "x" * 256, "n" * 255 + "[1-10]", "a[1]" * 1000,
    ],
)  # fmt: skip
def test_a_word_is_refused(word):
    with pytest.raises(UserError, match=r"\Acluster\.hosts, entry 2: .*; .*\. .*\.\Z") as caught:
        parse_hosts(["ok", word])
    # One line, in characters that a terminal shows.
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("-oProxyCommand=x", "entry 1: '-oProxyCommand=x' is no host; a host is letters, digits,"),
        ("@gpus", "the user '' of '@gpus' is none.*groups of hosts are not known here"),
        ("a,b", "Write hosts one by one, without commas"),
        ("n*", "Write the hosts out, or as a set"),
        ("host:8", "only such an address holds ':', apart from 'host:8' for slots in a hostfile"),
        ("n[4-1]", r"in 'n\[4-1\]' a range is none \(invalid values in range"),
        ("n[01-100]", "padding length mismatch"),
        ("n[x]", "'x' is no range of numbers.* Write it like"),
        ("n[1", "the brackets do not pair"),
        ("n[1-999999999]", "stands for 999999999 hosts; a job has at most 4096"),
        ("n[0-4096]", "stands for 4097 hosts"),
        ("n[1-100]r[1-100]", "stands for 10000 hosts"),
        ("n" + "[1-999999999]" * 80, r"stands for more than 10\^12 hosts"),
        ("n[1-9999999999]", "'1-9999999999' is no range of numbers"),
    ],
)
def test_a_refusal_says_why(word, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        parse_hosts([word])
    assert time.monotonic() - start < 1


def test_as_many_hosts_as_a_job_may_have():
    names = _names("n[0-4095]")
    assert (len(names), names[-1]) == (4096, "n4095")
    assert len(_names("n[1-64]r[1-64]")) == 4096


def test_a_list_names_each_host_once():
    message = r"entry 3: 'me@A' is named already at entry 1, as 'a'; each host is named once"
    with pytest.raises(UserError, match=message):
        parse_hosts(["a", "b", "me@A"])


def test_a_list_is_not_empty():
    with pytest.raises(UserError, match=r"cluster.hosts is empty; .* Write cluster.hosts="):
        parse_hosts([])


# -- SLURM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("node1", ["node1"]),
        ("n[1-3],m7", ["n1", "n2", "n3", "m7"]),
        # Not sorted: SLURM's first node is node 0.
        ("b2,a[1,3-4],c", ["b2", "a1", "a3", "a4", "c"]),
        ("rack[0-1]n[08-09]", ["rack0n08", "rack0n09", "rack1n08", "rack1n09"]),
    ],
)
def test_an_allocation(value, names):
    expected = _hosts(*((name, None) for name in names))
    assert allocated_hosts({"SLURM_JOB_NODELIST": value, "SLURM_JOB_ID": "7"}) == expected
    assert allocated_hosts({"SLURM_NODELIST": value}) == expected
    assert allocated_hosts({"SLURM_NODELIST": "old", "SLURM_JOB_NODELIST": value}) == expected


@pytest.mark.parametrize(
    "environ",
    [{}, {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_NODELIST": ""}, {"SLURM_JOB_NODELIST": " "}],
)
def test_no_allocation(environ):
    assert allocated_hosts(environ) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("n[1-", "the brackets do not pair"),
        ("(null)", "is no host"),
        ("a,,b", "'a,,b' has a comma with no host beside it"),
        ("a,", "has a comma"),
        ("n]1,2", "the brackets do not pair"),
        ("a b", "'a b' is no host"),
        ("--help", "'--help' is no host"),
        ("a,n[1-999999999]", "stands for 999999999 hosts"),
        ("n[1-4000],m[1-4000]", "'m97' is one host too many"),
        ("a,b,a", "'a' is named already at entry 1"),
    ],
)
@pytest.mark.parametrize("variable", ["SLURM_JOB_NODELIST", "SLURM_NODELIST"])
def test_a_bad_node_list(variable, value, message):
    with pytest.raises(UserError, match=f"{re.escape(variable)}.*{message}.*sbatch or salloc"):
        allocated_hosts({variable: value})


# -- anything -----------------------------------------------------------------------------------

_PIECES = [
    "n", "a1", "[", "]", "[1-3]", "[01-12]", "-", ",", ":", "::", "@", "%", "s", " ", "\t", "\r\n",
    "\n", "#", "=", "slots=", "max_slots=", "8", "0", "9" * 12, ".", "_", "/", "*", "!", "&", "^", "$(", "é",
    "\x00", "\x1b", "\ud800", "fe80::1", "%eth0", "user@", "SLURM",
]  # fmt: skip


def _accepted(function, argument):
    """Whatever it is given, there are hosts that ssh takes for such, or one line that says why not."""
    try:
        hosts = function(argument) or ()
    except UserError as error:
        assert str(error).isprintable()
        return 0
    for host in hosts:
        assert re.fullmatch(r"(\w[\w.-]*@)?(\w[\w.-]*|[\w:.]+(%[\w.-]+)?)", host.name, re.ASCII)
        assert host.slots is None or 1 <= host.slots <= 4096
    return len(hosts)


def test_any_text_is_read_or_refused(tmp_path):
    random_ = random.Random(1)
    path = tmp_path / "hostfile"
    found = [0, 0, 0]
    for _ in range(4000):
        text = "".join(random_.choices(_PIECES, k=random_.randint(0, 7)))
        path.write_bytes(text.encode(errors="surrogatepass"))
        found[0] += _accepted(read_hostfile, path)
        found[1] += _accepted(parse_hosts, text.split(" "))
        found[2] += _accepted(lambda value: allocated_hosts({"SLURM_NODELIST": value}), text)
    assert all(number > 100 for number in found)


def test_any_bytes_are_read_or_refused(tmp_path):
    random_ = random.Random(2)
    path = tmp_path / "hostfile"
    for size in range(500):
        path.write_bytes(random_.randbytes(size % 40))
        _accepted(read_hostfile, path)
        _accepted(parse_hosts, [random_.randbytes(size % 40).decode("latin-1")])


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, "," * 10**6, "n[1]," * 10**5, "a[1" * 10**5, "n[" + "1," * 5 * 10**5 + "1]",
     "=" * 10**6, "@" * 10**6, "1" * 10**6, "a " * 5 * 10**5, " =" * 5 * 10**5, "\t" * 10**6 + "a b"],
)  # fmt: skip
def test_a_large_text_is_refused_soon(tmp_path, text):
    start = time.monotonic()
    for function, argument in (
        (lambda text: _read(tmp_path, text), text),
        (parse_hosts, [text]),
        (lambda text: allocated_hosts({"SLURM_JOB_NODELIST": text}), text),
    ):
        with pytest.raises(UserError) as caught:
            function(argument)
        assert len(str(caught.value)) < 1000
    assert time.monotonic() - start < 30

"""Which hosts a job runs on, from a hostfile, a list or SLURM. Asks no network and no scheduler.

Names become arguments of ssh and srun, so only what cannot be mistaken for anything else is one.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import math
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster.errors import UserError

MAX_HOSTS = 4096
MAX_SLOTS = 4096
_MAX_BYTES = 1 << 20
_MAX_NAME = 255

_KEYS = ("slots", "max_slots", "max-slots")
_NODE_LISTS = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
# Nine digits: more are no host's number, and int() refuses thousands of them.
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9})(?:/([0-9]{1,9}))?)?")
_NUMBER = re.compile(r"[0-9]{1,9}")

_RULE = (
    "a host is letters, digits, '.', '-' and '_', beginning with a letter, a digit or '_', or an "
    "IPv6 address; user@ may stand before it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """name     as ssh or srun knows it: host, user@host, or an IPv6 address without brackets
    slots    ranks that are allotted to it; None: as many as it has devices
    """

    name: str
    slots: int | None


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file as DeepSpeed, Open MPI and MPICH write it, in its order.

    UserError when it cannot be read, and for any line that is not understood.
    """
    name = f"hostfile {str(path)!r}"
    entries = (
        (f"line {number}", host)
        for number, line in enumerate(_read(name, path).split("\n"), 1)
        for host in _of_line(_Place(f"{name}, line {number}"), line)
    )
    hosts = _collect(_Place(name), entries)
    if not hosts:
        raise UserError(
            f"{name} names no host; it has one a line. Write lines such as 'node1 slots=8'."
        )
    return hosts


def parse_hosts(names: Sequence[str]) -> tuple[Host, ...]:
    """The hosts of cluster.hosts, in its order; each word is a host or a node set: n[1-4]."""
    entries = (
        (f"entry {number}", Host(name=name, slots=None))
        for number, word in enumerate(names, 1)
        for name in _expand(_Place(f"cluster.hosts, entry {number}"), word)
    )
    hosts = _collect(_Place("cluster.hosts"), entries)
    if not hosts:
        raise UserError(
            "cluster.hosts is empty; it names one host or more. Write cluster.hosts=[node1, node2], "
            "or leave it out."
        )
    return hosts


def allocated_hosts(environ: Mapping[str, str]) -> tuple[Host, ...] | None:
    """The nodes of the SLURM allocation that this process is in, in SLURM's order; None outside one.

    The node list alone decides. A job number without one says nothing of hosts, and may have come
    along in a copied environment. The tasks that SLURM counts are not taken for slots: sbatch's
    default is one a node, whatever devices are there.
    """
    variable = next((name for name in _NODE_LISTS if environ.get(name, "").strip()), None)
    if variable is None:
        return None
    place = _Place(
        variable,
        "It is SLURM's to set: start the job again with sbatch or salloc, or unset it to use other "
        "hosts.",
    )
    words = _split(place, environ[variable].strip())
    entries = (
        (f"entry {number}", Host(name=name, slots=None))
        for number, word in enumerate(words, 1)
        for name in _expand(place, word)
    )
    return _collect(place, entries)


# -- lines --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something was written, for messages; `remedy` takes the place of a mistake's own."""

    name: str
    remedy: str = ""

    def wrong(self, what: str, rule: str, remedy: str = "") -> UserError:
        return UserError(f"{self.name}: {what}; {rule}. {self.remedy or remedy or 'Correct it.'}")


def _read(name: str, path: Path) -> str:
    try:
        # Not opened before it is known to be a file: a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(
                f"{name} is not a file; it is read as lines of text. Give the path of a file."
            )
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be read: {getattr(error, 'strerror', error)}. Give the "
            "path of a file that you may read."
        ) from None
    if len(raw) > _MAX_BYTES:
        raise UserError(
            f"{name} has more than {_MAX_BYTES:,} bytes; it names at most "
            f"{MAX_HOSTS} hosts. Check that it is the right file."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {number}: byte {raw[error.start]:#04x} is not UTF-8; a "
            "hostfile is plain text. Save it as UTF-8."
        ) from None


def _of_line(place: _Place, line: str) -> Iterator[Host]:
    # Blanks around '=' as Open MPI allows them.
    text = re.sub(r"[ \t]*=[ \t]*", "=", line.partition("#")[0].strip(" \t\r"))
    if not text:
        return
    word, *settings = re.split(r"[ \t]+", text)
    word, slots = _split_count(place, word)
    for key, number in _settings(place, settings).items():
        if key == "slots":
            if slots is not None:
                raise place.wrong(
                    f"slots={number} stands beside ':{slots}'", "slots are given once", "Drop one."
                )
            slots = number
        elif slots is None or number < slots:
            raise place.wrong(
                f"max_slots is {number}, but slots is {'not given' if slots is None else slots}",
                "it stands beside slots, and is no less",
                f"Write slots={number}.",
            )
    for host in _expand(place, word):
        yield Host(name=host, slots=slots)


def _split_count(place: _Place, word: str) -> tuple[str, int | None]:
    """MPICH's host:8. More than one colon is an IPv6 address, which has a count after brackets only."""
    head, colon, count = word.rpartition(":")
    if not colon or (":" in head and not head.endswith("]")) or word.endswith("]"):
        return word, None
    return head, _number(place, "the count after ':'", count)


def _settings(place: _Place, words: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise place.wrong(
                f"{_shown(word)} stands after the host",
                "a line is a host, then slots=N and max_slots=N",
                f"Write slots={word}." if _NUMBER.fullmatch(word) else "One host a line.",
            )
        if key not in _KEYS:
            close = difflib.get_close_matches(key[:_MAX_NAME].lower(), _KEYS, n=1)
            raise place.wrong(
                f"{_shown(key)} is not known",
                f"known are {', '.join(_KEYS)}",
                f"Did you mean {close[0]}?" if close else "Leave it out.",
            )
        key = key.replace("-", "_")
        if key in found:
            raise place.wrong(f"{key} stands twice", "it is given once", "Drop one.")
        found[key] = _number(place, key, value)
    # In this order: what max_slots is compared with comes first.
    return {key: found[key] for key in ("slots", "max_slots") if key in found}


def _number(place: _Place, name: str, text: str) -> int:
    number = int(text) if _NUMBER.fullmatch(text) else 0
    if not 1 <= number <= MAX_SLOTS:
        raise place.wrong(
            f"{name} is {_shown(text)}",
            f"it is a whole number from 1 to {MAX_SLOTS}",
            "Write the number of ranks for this host, or leave it out for one on each device.",
        )
    return number


# -- names --------------------------------------------------------------------------------------


def _expand(place: _Place, word: str) -> Iterator[str]:
    """The names that a word stands for, checked: an IPv6 address, a host, or a node set."""
    user, at, host = word.rpartition("@")
    if at and not (_USER.fullmatch(user) and len(user) <= _MAX_NAME):
        raise place.wrong(
            f"the user {_shown(user)} of {_shown(word)} is none",
            "a user is letters, digits, '.', '-' and '_', not beginning with '.' or '-', and "
            "stands before one '@'; groups of hosts are not known here",
            "Write user@host.",
        )
    if ":" in host:
        yield user + at + _ipv6(place, word, host)
    elif "[" in host or "]" in host:
        yield from (user + at + name for name in _node_set(place, word, host))
    else:
        _check(place, word, host)
        yield user + at + host


def _check(place: _Place, word: str, host: str) -> None:
    if not _HOST.fullmatch(host) or len(host) > _MAX_NAME:
        raise place.wrong(f"{_shown(word)} is no host", _RULE, _remedy(host))


def _remedy(host: str) -> str:
    if "," in host:
        return "Write hosts one by one, without commas."
    if re.search(r"[*?!&^]", host):
        return "Write the hosts out, or as a set: n[1-4]."
    return "Correct it."


def _ipv6(place: _Place, word: str, host: str) -> str:
    text = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if not _IPV6.fullmatch(text) or len(text) > _MAX_NAME:
            raise ValueError
        ipaddress.IPv6Address(text)
    except ValueError:
        raise place.wrong(
            f"{_shown(word)} is no IPv6 address",
            "only such an address holds ':', apart from 'host:8' for slots in a hostfile",
            "Write an address such as fd00::1; ssh's port belongs into ~/.ssh/config.",
        ) from None
    return text


def _node_set(place: _Place, word: str, text: str) -> Iterator[str]:
    """n[1-3,7] as n1, n2, n3, n7, in the order written.

    Only the ranges are ClusterShell's: its NodeSet would sort, drop what stands twice, read n1[8-11]
    as n18 to n111, and look up groups.
    """
    from ClusterShell.RangeSet import RangeSet, RangeSetParseError

    def wrong(what: str) -> UserError:
        return place.wrong(
            f"in {_shown(word)} {what}",
            "a node set is a name with ranges in brackets",
            "Write it like n[1-4,7] or n[01-16].",
        )

    # Literal text and the contents of brackets take turns.
    parts = _BRACKETS.split(text)
    literals, contents = parts[::2], parts[1::2]
    if any("[" in literal or "]" in literal for literal in literals):
        raise wrong("the brackets do not pair")
    if sum(map(len, literals)) + len(contents) > _MAX_NAME:
        raise wrong(f"names have more than {_MAX_NAME} characters")
    # Every literal is text of a name; which characters a name may begin with is seen when it is whole.
    if bad := next((each for each in literals if not _HOST.fullmatch("x" + each)), None):
        raise place.wrong(
            f"in {_shown(word)}, {_shown(bad)} is no part of a host", _RULE, _remedy(bad)
        )

    ranges = [content.split(",") for content in contents]
    sizes = []
    for each in ranges:
        matches = [(part, _RANGE.fullmatch(part)) for part in each]
        if bad := next((repr(part[:40]) for part, match in matches if match is None), None):
            raise wrong(f"{bad} is no range of numbers")
        sizes.append(sum(_size(match.groups()) for _, match in matches if match is not None))
    if (size := math.prod(sizes)) > MAX_HOSTS:
        raise place.wrong(
            f"{_shown(word)} stands for {size if size < 10**12 else 'more than 10^12'} hosts",
            f"a job has at most {MAX_HOSTS}",
            "Correct the ranges.",
        )

    numbers: list[list[str]] = []
    for each in ranges:
        try:
            numbers.append([number for part in each for number in RangeSet(part).striter()])
        except RangeSetParseError as error:
            raise wrong(f"a range is none ({error})") from None
    for chosen in itertools.product(*numbers):
        pairs = itertools.zip_longest(literals, chosen, fillvalue="")
        name = "".join(literal + number for literal, number in pairs)
        _check(place, word, name)
        yield name


def _size(bounds: Sequence[str | None]) -> int:
    """Of one range. Backwards it counts as one; ClusterShell refuses it."""
    first, last, step = (None if text is None else int(text) for text in bounds)
    assert first is not None
    if last is None or (not step and step is not None):
        return 1
    return max((last - first) // (step or 1) + 1, 1)


def _split(place: _Place, text: str) -> list[str]:
    """At the commas outside brackets."""
    words, start, depth = [], 0, 0
    for position, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            words.append(text[start:position])
            start = position + 1
    words.append(text[start:])
    if "" in words:
        raise place.wrong(
            f"{_shown(text)} has a comma with no host beside it", "hosts stand between commas"
        )
    return words


# -- all of them --------------------------------------------------------------------------------


def _collect(source: _Place, entries: Iterable[tuple[str, Host]]) -> tuple[Host, ...]:
    """All hosts, each once. `entries` come with where they stand, and are taken one by one."""
    hosts: list[Host] = []
    seen: dict[str, tuple[str, str]] = {}
    for where, host in entries:
        place = _Place(f"{source.name}, {where}", source.remedy)
        if len(hosts) == MAX_HOSTS:
            raise place.wrong(
                f"{_shown(host.name)} is one host too many",
                f"a job has at most {MAX_HOSTS}",
                "Name fewer.",
            )
        key = _identity(host.name)
        if key in seen:
            before, written = seen[key]
            raise place.wrong(
                f"{_shown(host.name)} is named already at {before}"
                + ("" if written == host.name else f", as {_shown(written)}"),
                "each host is named once, whatever its user and case",
                "Drop one; in a hostfile slots=N says how many ranks a host has.",
            )
        seen[key] = where, host.name
        hosts.append(host)
    return tuple(hosts)


def _identity(name: str) -> str:
    """The same for two names of one host, as far as their letters tell."""
    host = name.rpartition("@")[2]
    return str(ipaddress.IPv6Address(host)) if ":" in host else host.casefold().rstrip(".")


def _shown(value: object) -> str:
    """Untrusted text for a message: on one line, not endless, its control characters escaped."""
    text = str(value)
    return repr(text if len(text) <= 80 else text[:77] + "...")

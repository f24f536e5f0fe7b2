"""The system calls that a walled task may not make: no namespace keeps what they reach apart.

The kernel's keyrings pass from a process to those that it starts, whatever their namespaces; the others have been ways
out of namespaces before. What is refused answers "Operation not permitted". seccomp(2) has the format of a filter.
"""

from __future__ import annotations

import platform
import struct

__all__ = ["seccomp_filter"]

REFUSED = {  # by the names of asm/unistd.h
    "x86_64": {
        "userfaultfd": 323,
        "perf_event_open": 298,
        "bpf": 321,
        "io_uring_setup": 425,
        "open_by_handle_at": 304,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
    },
    "aarch64": {
        "userfaultfd": 282,
        "perf_event_open": 241,
        "bpf": 280,
        "io_uring_setup": 425,
        "open_by_handle_at": 265,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
    },
}

#: AUDIT_ARCH_… of linux/audit.h.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Of linux/bpf_common.h and linux/seccomp.h.
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER, ARCHITECTURE = 0, 4
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1
X32 = 0x40000000


def seccomp_filter() -> bytes | None:
    """The filter as the kernel reads it; None on a machine whose numbers are not known here.

    Calls by another architecture's numbers, which a 32-bit program makes, are all refused.
    """
    machine = platform.machine()
    if machine not in REFUSED:
        return None
    tests = [(JUMP_IF_EQUAL, number) for number in REFUSED[machine].values()]
    if machine == "x86_64":
        tests.append((JUMP_IF_AT_LEAST, X32))
    program = [(LOAD, 0, 0, ARCHITECTURE), (JUMP_IF_EQUAL, 0, len(tests) + 2, ARCHITECTURES[machine])]
    program.append((LOAD, 0, 0, NUMBER))
    for place, (test, number) in enumerate(tests):
        program.append((test, len(tests) - place, 0, number))
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)

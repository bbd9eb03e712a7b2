"""Start bubblewrap as a user without rights, with folders that this user cannot reach by itself.

A program of its own: ``python -I -S reach.py UID FOLDER.. -- BWRAP ARGUMENT..``, started by root.
In mounts that nobody else sees, folder number i is shown as ``/tmp/i``; so an interpreter under
``/root`` can be bound into the sandbox though ``/root`` is closed.
"""

import ctypes
import os
import sys

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 0x4000, 0x40000


def main() -> None:
    """Mount, give up root, become bubblewrap."""
    split = sys.argv.index("--")
    uid, folders, command = int(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :]
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result != 0:
            sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")

    check(libc.unshare(_CLONE_NEWNS), "a mount namespace")
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount /")
    held = [os.open(folder, os.O_PATH) for folder in folders]  # our /tmp may hide one
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), b"mode=755"), "mount /tmp")
    for number, file in enumerate(held):
        target = f"/tmp/{number}"
        os.mkdir(target)
        flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
        source = f"/proc/self/fd/{file}".encode()
        check(libc.mount(source, target.encode(), None, flags, None), f"mount {folders[number]}")
        os.close(file)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

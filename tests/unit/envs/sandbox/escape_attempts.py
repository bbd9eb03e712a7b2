"""Attempts to get out of the sandbox, to break it or to leave something behind.

Each is a script that prints ``ESCAPED`` where it succeeds. Most print ``held`` where it does not,
so that a script with a mistake of its own is no proof; others have to end in a certain way.
``{name}`` in braces of three is filled in by the test: a port, a path, a secret of the outside.
"""

from dataclasses import dataclass
from textwrap import dedent, indent


@dataclass(frozen=True)
class Attempt:
    """A script, and how it has to end (statuses of an Execution)."""

    name: str
    code: str
    ends: tuple[str, ...] = ("ok",)
    """One of these."""
    held: bool = True
    """Whether it says that it was held."""
    short: bool = False
    """It goes on until it is stopped: it gets a second, or little memory where it ends for that."""


def refused(name: str, code: str, *errors: str) -> Attempt:
    """An attempt that must end with one of these exceptions (default: OSError)."""
    kinds = ", ".join(errors or ("OSError",))
    body = indent(dedent(code).strip(), "    ")
    return Attempt(
        name,
        f"{_PRELUDE}\ntry:\n{body}\nexcept ({kinds},) as error:\n    print('held', repr(error))\n"
        "else:\n    print('ESCAPED')\n",
    )


def system_call(name: str, number: str, arm_number: int, *arguments: str) -> Attempt:
    """A system call that the kernel must not even look at: EPERM or ENOSYS whatever is passed."""
    passed = "".join(f", {a}" for a in arguments)
    made = f"call({number} if x86 else {arm_number}{passed})"
    code = f"try:\n    {made}\nexcept OSError as error:\n    assert error.errno in (1, 38), error\n"
    return asserted(name, code + "else:\n    print('ESCAPED')")


def stopped(name: str, code: str, *ends: str) -> Attempt:
    """An attempt that goes on until it is stopped."""
    return Attempt(name, _PRELUDE + dedent(code), ends, held=False, short=True)


def over(name: str, code: str, *ends: str) -> Attempt:
    """An attempt that ends by itself, in one of these ways."""
    return Attempt(name, _PRELUDE + dedent(code), ends, held=False)


def asserted(name: str, code: str) -> Attempt:
    """An attempt that compares for itself; a failed assertion is an escape."""
    return Attempt(name, f"{_PRELUDE}{dedent(code)}\nprint('held')\n")


_PRELUDE = """
import ctypes, os, platform, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def call(number, *arguments):
    return check(libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))
"""

NETWORK = (
    refused("a server of this machine", "socket.create_connection(('127.0.0.1', {{{port}}}), 3)"),
    refused("an address on the network", "socket.create_connection(('1.1.1.1', 53), 3)"),
    refused("an IPv6 address", "socket.create_connection(('2606:4700:4700::1111', 53), 3)"),
    refused("a name server", "socket.getaddrinfo('example.org', 80)"),
    refused("a datagram", "socket.socket(2, 2).sendto(b'x', ('8.8.8.8', 53))"),
    refused(
        "a broadcast",
        """
        s = socket.socket(2, 2)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.sendto(b'x', ('255.255.255.255', 9))
        """,
    ),
    refused("an abstract socket", "socket.socket(1, 1).connect('\\0{{{abstract}}}')"),
    refused("a socket file", "socket.socket(1, 1).connect('{{{socket}}}')"),
    refused("a raw socket", "socket.socket(2, socket.SOCK_RAW, socket.IPPROTO_ICMP)"),
    refused("the network's settings", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    refused("packets", "socket.socket(17, socket.SOCK_RAW, 0)"),
    refused("a socket to the hypervisor", "socket.socket(40, 1).connect((2, 1))"),
    refused("the kernel's ciphers", "socket.socket(38, 5, 0)"),
)

FILES = (
    refused("passwords", "open('/etc/shadow').read()"),
    refused("users", "open('/etc/passwd').read()"),
    refused("home folders", "os.listdir('/root') + os.listdir('/home')"),
    refused("the project", "open('{{{project}}}').read()"),
    refused("a file of another user", "open('{{{secret_file}}}').read()"),
    refused("a symbolic link to it", "os.symlink('{{{secret_file}}}', 'x'); open('x').read()"),
    refused("dots", "open('/tmp/' + '../' * 40 + '{{{secret_file}}}'[1:]).read()"),
    refused("a hard link to a program", "os.link('/usr/bin/env', '/tmp/x')"),
    refused("the root of process 1", "os.listdir('/proc/1/root/tmp')"),
    refused("the worker's root", "os.listdir(f'/proc/{os.getppid()}/root')"),
    refused("a file by its handle", "call(304 if x86 else 265, -100, 0, 0)"),
    refused("writing to /usr", "open('/usr/bin/x', 'w')"),
    refused("changing a program", "os.chmod('/usr/bin/env', 0o777)"),
    refused("writing to /", "os.mkdir('/x')"),
    refused("writing to /etc", "open('/etc/ld.so.preload', 'w')"),
    refused("writing to /dev", "open('/dev/x', 'w')"),
    refused("a device", "os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))"),
    refused("the machine's memory", "open('/dev/mem', 'rb').read(1)"),
    refused("settings of the kernel", "open('/proc/sys/kernel/core_pattern', 'w').write('|/x')"),
    refused("sysrq", "open('/proc/sysrq-trigger', 'w').write('b')"),
    asserted(
        "every folder of site-packages",
        """
        import site, sysconfig
        places = {*site.getsitepackages(), *sysconfig.get_paths().values(), *sys.path} - {'/tmp'}
        for place in places:
            try:
                open(os.path.join(place, 'sitecustomize.py'), 'w')
            except OSError:
                continue
            assert False, place
        """,
    ),
    asserted(
        "what is in /dev",
        """
        expected = {'null', 'zero', 'full', 'random', 'urandom', 'shm'}
        expected |= {'fd', 'stdin', 'stdout', 'stderr'}
        assert set(os.listdir('/dev')) == expected, os.listdir('/dev')
        """,
    ),
)

RIGHTS = (
    refused("to be root", "os.setuid(0)"),
    refused("root's group", "os.setgid(0)"),
    refused("other groups", "os.setgroups([0])"),
    asserted(
        "programs that make one root",
        """
        import subprocess
        held = [f'/usr/bin/{n}' for n in os.listdir('/usr/bin')]
        held = [p for p in held if os.path.exists(p) and os.stat(p).st_mode & 0o4000]
        for program in held:
            done = subprocess.run([program, '-c', 'id -u'], capture_output=True, stdin=0, timeout=5)
            assert done.stdout.strip() != b'0', program
        """,
    ),
    asserted(
        "a program of one's own with set-uid",
        """
        import shutil, subprocess
        shutil.copy('/usr/bin/id', 'id')
        os.chmod('id', 0o6755)
        assert subprocess.run(['./id', '-u'], capture_output=True).stdout != b'0\\n'
        """,
    ),
    asserted(
        "capabilities",
        """
        lines = open('/proc/self/status').read().splitlines()
        held = dict(line.split(':', 1) for line in lines)
        for name in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb'):
            assert int(held[name], 16) == 0, (name, held[name])
        assert held['NoNewPrivs'].strip() == '1' and held['Seccomp'].strip() == '2'
        """,
    ),
    refused("a mount", "check(libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None))"),
    refused("/usr made writable", "check(libc.mount(None, b'/usr', None, 32 | 4096, None))"),
    refused("taking /proc away", "check(libc.umount2(b'/proc', 2))"),
    refused("chroot", "os.chroot('/tmp')"),
    system_call("pivot_root", "155", 41, "0", "0"),
    refused("a user namespace", "check(libc.unshare(0x10000000))"),
    refused("a network namespace", "check(libc.unshare(0x40000000))"),
    system_call("a clone with a user namespace", "56", 220, "0x10000000 | 17", "0"),
    system_call("clone3", "435", 435, "0", "0"),
    refused(
        "the namespaces of process 1",
        "check(libc.setns(os.open('/proc/1/ns/net', os.O_RDONLY), 0))",
    ),
    system_call("open_tree", "428", 428, "-100", "0", "0"),
    system_call("io_uring", "425", 425, "1", "0"),
    system_call("bpf", "321", 280, "0", "0", "0"),
    system_call("perf events", "298", 241, "0", "0", "-1", "-1", "0"),
    system_call("userfaultfd", "323", 282, "1"),
    system_call("the kernel's log", "103", 116, "10", "0", "0"),
    system_call("naming the host", "170", 161, "0", "0"),
    system_call("reboot", "169", 142, "0", "0", "0"),
    system_call("the keyrings", "250", 219, "0", "-3", "0"),
    refused("a key", "call(248 if x86 else 217, 0, 0, 0, 0, -4)"),
    system_call("shared memory of System V", "29", 194, "0", "4096", "0o1600"),
    system_call("a message queue", "240", 180, "0", "0o100", "0o600", "0"),
    system_call("memory without a limit", "319", 279, "0", "0"),
    refused(
        "watching other folders",
        "call(294 if x86 else 26, 0)",
    ),
    system_call("a call that is not known yet", "463", 463, "0"),
    refused("an x32 call", "call(0x40000000 + 39)"),
    refused("terminal input", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')"),
)

WORKER = (
    refused("tracing the worker", "check(libc.ptrace(16, os.getppid(), 0, 0))"),
    system_call("reading the worker's memory", "310", 270, "os.getppid()", "0", "0", "0", "0", "0"),
    refused("its memory by file", "open(f'/proc/{os.getppid()}/mem', 'rb')"),
    refused("its variables", "open(f'/proc/{os.getppid()}/environ').read()"),
    refused("its files", "os.listdir(f'/proc/{os.getppid()}/fd')"),
    refused("its memory maps", "open(f'/proc/{os.getppid()}/maps').read(1)"),
    refused(
        "one of its files by number",
        "call(438, check(libc.syscall(434, os.getppid(), 0)), 100, 0)",
    ),
    refused("its limits", "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))"),
    refused("its priority", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    refused("its processors", "os.sched_setaffinity(os.getppid(), {0})"),
    refused(
        "more memory", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError", "OSError"
    ),
    asserted(
        "files that were left open",
        """
        held = []
        for number in range(3, 4096):
            try:
                os.write(number, b'\\0' * 64)
                held.append(number)
            except OSError:
                pass
        assert not held, held
        """,
    ),
    asserted(
        "the worker's objects",
        """
        import gc
        found = [x for x in gc.get_objects() if type(x).__name__ == 'Keeper']
        frame = sys._getframe()
        while frame:
            found += [v for v in frame.f_locals.values() if type(v).__name__ == 'Keeper']
            frame = frame.f_back
        for keeper in found:
            try:
                keeper._answer(0, 0, 0.0)
            except (OSError, ValueError):
                continue
            assert False, 'an answer of our own was sent'
        """,
    ),
    refused("our modules", "import megatron_spear.envs.sandbox.inside.keeper", "ImportError"),
    asserted(
        "the machine's handler of crashes",
        """
        limits = open('/proc/self/limits').read().splitlines()
        (line,) = [x for x in limits if x.startswith('Max core file size')]
        assert line.split()[4:6] in (['1', '1'], ['0', '0']), line  # 1: no handler is started
        for limits in ((0, 0), (0, 1)):
            try:
                resource.setrlimit(resource.RLIMIT_CORE, limits)
                assert False
            except (OSError, ValueError):
                pass
        """,
    ),
    asserted(
        "every file of the worker in /proc",
        """
        closed = {'mem', 'environ', 'maps', 'fd', 'root', 'cwd', 'exe', 'stack', 'pagemap'}
        worker = f'/proc/{os.getppid()}/'
        for name in os.listdir(worker):
            for mode in (os.O_RDONLY, os.O_WRONLY):
                try:
                    file = os.open(worker + name, mode)
                    assert name not in closed, name
                    if mode == os.O_WRONLY:
                        os.write(file, b'1')
                        assert False, name
                except OSError:
                    pass
        """,
    ),
    asserted("killing the worker", "os.kill(os.getppid(), 9)"),
    asserted("stopping the worker", "os.kill(os.getppid(), signal.SIGSTOP)"),
    asserted(
        "every signal to the worker",
        """
        for number in range(1, 65):
            if number not in (32, 33):
                os.kill(os.getppid(), number)
        """,
    ),
    refused("killing everything", "os.kill(-1, 9)"),
    asserted(
        "a signal by way of a file",
        """
        import fcntl
        ours, other = socket.socketpair()
        fcntl.fcntl(ours, fcntl.F_SETOWN, os.getppid())
        fcntl.fcntl(ours, 10, signal.SIGKILL)
        fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)
        other.send(b'x')
        """,
    ),
    asserted("forged answers", "os.write(1, b'\\0' * 200)\nos.write(2, b'\\0' * 200)"),
)

SURROUNDINGS = (
    asserted("variables", "assert not [k for k, v in os.environ.items() if '{{{secret}}}' in v]"),
    asserted(
        "other processes",
        """
        pids = sorted(int(n) for n in os.listdir('/proc') if n.isdigit())
        assert pids == [1, os.getpid()] and os.getppid() == 1, pids
        for pid in pids:
            for name in ('environ', 'cmdline'):
                try:
                    assert b'{{{secret}}}' not in open(f'/proc/{pid}/{name}', 'rb').read()
                except OSError:
                    pass
        """,
    ),
    refused("the input", "input()", "EOFError"),
    asserted("the host's name", "assert socket.gethostname() == 'sandbox'"),
    asserted(
        "another program",
        """
        import subprocess
        script = 'cat {{{secret_file}}}; echo $SPEAR_SECRET'
        done = subprocess.run(['sh', '-c', script], capture_output=True)
        assert done.stdout == b'\\n', done.stdout
        """,
    ),
    asserted(
        "a pickled payload",
        """
        import pickle
        class Payload:
            def __reduce__(self):
                return os.system, ('touch {{{mark}}} /tmp/mark 2>/dev/null',)
        pickle.loads(pickle.dumps(Payload()))
        assert os.path.exists('/tmp/mark') and not os.path.exists('{{{mark}}}')
        os.write(1, pickle.dumps(Payload()))
        """,
    ),
)

RESOURCES = (
    stopped(
        "a fork bomb",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        "timeout",
        "memory",
    ),
    stopped(
        "a bomb of the shell",
        "os.system(':(){ :|:& };:'); import time; time.sleep(9)",
        "timeout",
        "memory",
    ),
    over("memory", "x = bytearray(2 << 30)", "memory"),
    stopped("memory bit by bit", "x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    stopped(
        "memory of many processes",
        """
        for i in range(8):
            if os.fork() == 0:
                x = bytearray(100 << 20)
                for i in range(0, len(x), 4096): x[i] = 1
                signal.pause()
        signal.pause()
        """,
        "memory",
    ),
    stopped(
        "shared memory of many processes",
        """
        import mmap
        for i in range(8):
            if os.fork() == 0:
                x = mmap.mmap(-1, 100 << 20)
                for i in range(0, len(x), 4096): x[i] = 1
                signal.pause()
        signal.pause()
        """,
        "memory",
    ),
    refused("a large file", "f = open('x', 'wb')\nfor i in range(100): f.write(bytes(1 << 20))"),
    refused(
        "many large files",
        "for i in range(20): open(f'/tmp/{i}', 'wb').write(bytes(10 << 20))",
    ),
    refused(
        "large files in both folders",
        """
        for i in range(10):
            for folder in ('/tmp', '/dev/shm'):
                open(f'{folder}/{i}', 'wb').write(bytes(9 << 20))
        """,
    ),
    refused("many files", "for i in range(20_000): open(f'/tmp/{i}', 'wb').close()"),
    refused("many open files", "held = [open('/dev/null') for _ in range(5000)]"),
    refused(
        "many threads",
        """
        import threading
        stop = threading.Event()
        try:
            for _ in range(1000): threading.Thread(target=stop.wait).start()
        finally:
            stop.set()
        """,
        "RuntimeError",
    ),
    refused(
        "children that nobody takes",
        "for _ in range(1000):\n    if os.fork() == 0: os._exit(0)",
    ),
    stopped("a loop", "while True: pass", "timeout"),
    stopped("a loop in C", "9 ** 9 ** 9", "timeout", "memory"),
    stopped("a regular expression", "import re; re.match('(a*)*$', 'a' * 60 + 'b')", "timeout"),
    stopped("sleep", "import time; time.sleep(3600)", "timeout"),
    stopped(
        "signals that are ignored",
        """
        for number in set(signal.Signals) - {9, 19}:
            signal.signal(number, signal.SIG_IGN)
        while True: pass
        """,
        "timeout",
    ),
    stopped(
        "a loop at the exit",
        "import atexit\n@atexit.register\ndef f():\n    while 1: pass",
        "timeout",
    ),
    stopped(
        "a thread that goes on",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        "timeout",
    ),
    stopped("output without end", "while True: print('x' * 1000)", "killed", "timeout"),
    stopped("errors without end", "while True: sys.stderr.write('x' * 1000)", "killed", "timeout"),
    stopped("output of a child without end", "os.system('yes'); ", "killed", "timeout"),
    over("a line of 40 MB", "print('x' * (40 << 20))", "killed"),
    over("a crash", "ctypes.string_at(0)", "killed"),
    over("abort", "os.abort()", "killed"),
    stopped(
        "endless recursion",
        "sys.setrecursionlimit(10**8)\ndef f(): f()\nf()",
        "memory",
        "timeout",
        "killed",
    ),
    over(
        "recursion in C",
        "sys.setrecursionlimit(10**8)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        "killed",
        "memory",
        "error",
    ),
    over("a hard exit", "print('x', flush=True); os._exit(5)", "error"),
    over("a signal to itself", "os.kill(os.getpid(), signal.SIGTERM)", "killed"),
    over("an exit status that is none", "sys.exit(['a', 'list'])", "error"),
    over(
        "an exception without a text",
        "class E(Exception):\n    def __str__(self): 1/0\nraise E",
        "error",
    ),
    over("the end of Python", "class E(BaseException): pass\nraise E", "error"),
    over("an exit at the exit", "import atexit\natexit.register(os._exit, 0)", "ok"),
    over(
        "closed files",
        "for i in range(256):\n    try: os.close(i)\n    except OSError: pass\nprint(1)",
        "error",
        "ok",
    ),
    over("no module left", "sys.modules.clear()", "ok", "error"),
    over("no exit", "os._exit = None; sys.exit = None; del sys.stdout, sys.stderr", "error", "ok"),
)

ATTEMPTS = (*NETWORK, *FILES, *RIGHTS, *WORKER, *SURROUNDINGS, *RESOURCES)

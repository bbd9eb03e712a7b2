"""What one script may leave for the next, and texts that are hardly code."""

LEFT_BEHIND = {
    "variables of the script": ("x = 1; import builtins; builtins.x = 1", "x"),
    "a builtin": ("import builtins; builtins.len = lambda x: 7", "assert len('ab') != 2"),
    "a function of a module": (
        "import math; math.sqrt = lambda x: 7",
        "import math; assert math.sqrt(4) != 2",
    ),
    "a module": (
        "import sys, types; sys.modules['evil'] = types.ModuleType('evil')",
        "import evil",
    ),
    "a search path": (
        "import sys; sys.path.append('/evil')",
        "import sys; assert '/evil' in sys.path",
    ),
    "an environment variable": (
        "import os; os.environ['EVIL'] = '1'",
        "import os; os.environ['EVIL']",
    ),
    "the folder": (
        "import os; os.mkdir('/tmp/d'); os.chdir('/tmp/d')",
        "import os; assert os.getcwd() != '/tmp'",
    ),
    "a trace function": (
        "import sys; sys.settrace(lambda *a: 1/0)",
        "import sys; assert sys.gettrace()",
    ),
    "a hook of imports": (
        "import sys; sys.meta_path.clear()",
        "import sys; assert not sys.meta_path",
    ),
    "what happens at the exit": ("import atexit; atexit.register(print, 'evil')", "assert False"),
    "a signal handler": (
        "import signal; signal.signal(15, lambda *a: 0)",
        "import signal; assert callable(signal.getsignal(15))",
    ),
    "a mask of files": ("import os; os.umask(0o777)", "import os; assert os.umask(0) == 0o777"),
    "a limit": (
        "import resource; resource.setrlimit(7, (9, 9))",
        "import resource; assert resource.getrlimit(7) == (9, 9)",
    ),
    "a file": ("open('/tmp/evil.py', 'w').write('')", "import evil"),
    "a file in shared memory": ("open('/dev/shm/evil', 'w')", "open('/dev/shm/evil')"),
    "a locked folder": (
        "import os; os.makedirs('/tmp/a/b'); os.chmod('/tmp/a', 0)",
        "import os; assert os.listdir('/tmp')",
    ),
    "a process": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(99)\n    os._exit(0)",
        "import os; assert len([n for n in os.listdir('/proc') if n.isdigit()]) > 2",
    ),
    "a process that holds the output": (
        "import subprocess; subprocess.Popen(['sh', '-c', 'trap \"\" 1 2 15; sleep 99'])",
        "import os; assert len([n for n in os.listdir('/proc') if n.isdigit()]) > 2",
    ),
    "a thread": (
        "from threading import Thread\nimport time\n"
        "Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "import threading; assert threading.active_count() > 1",
    ),
    "an alarm": (
        "import signal; signal.setitimer(signal.ITIMER_REAL, 0.2)",
        "import time; time.sleep(0.4); assert False",
    ),
    "a server": (
        "import os, socket, time\ns = socket.create_server(('127.0.0.1', 7777))\n"
        "if os.fork() == 0: time.sleep(99)",
        "import socket; socket.create_connection(('127.0.0.1', 7777), 1)",
    ),
    "random numbers": (
        "import random; random.seed(5)",
        "import random; x = random.random(); random.seed(5); assert x == random.random()",
    ),
}
"""What one script leaves, and a second that ends with "ok" only if it finds it."""

TEXTS = {
    "nothing": "",
    "NUL": "print(1)\x00",
    "a lone surrogate": "print('\ud800')",
    "a pair in the wrong order": "x = '\udc00\ud800'",
    "right to left": "access = 'user\u202e \u2066# admin\u2069 \u2066'",
    "letters that look alike": "sсope = 1  # \u0441",
    "no spaces": "\u00a0\u2003\u3000print(1)",
    "an encoding": "# -*- coding: rot13 -*-\ncevag(1)",
    "an unknown encoding": "# coding: nothing\nprint(1)",
    "a byte order mark": "\ufeffprint(1)",
    "line ends": "print(1)\r\rprint(2)\u2028print(3)\x0c",
    "deep": "(" * 100_000,
    "deeper": "-" * 900_000 + "1",
    "a million": "x" * 1_000_000,
    "more": "x" * 1_000_001,
    "an emoji": "\N{GRINNING FACE}",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x9b",
    "not Python": '<tool_call>{"name": "code_interpreter"}</tool_call>',
}

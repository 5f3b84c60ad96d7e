"""Our side of the store's benchmark: planes, publishes, fetches, volumes, and a launch over a thin link."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from lib import run, size_of

APPLIANCE = """publisher = "bench"
name = "debian"
version = "{version}"
[hardware]
memory = "256M"
[[disk]]
name = "system"
role = "system"
file = "system.raw"
"""


def folder_of(work, disk, version=None):
    """A folder that `publish` takes, around a disk file."""
    version = version or disk.stem
    folder = work / "versions" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "system.raw").unlink(missing_ok=True)
    os.link(disk, folder / "system.raw")
    (folder / "appliance.toml").write_text(APPLIANCE.format(version=version))
    return folder


class Site:
    """A plane with a host, in a folder of its own, as a user has it."""

    def __init__(self, program, folder, listen=None, more=()):
        self.program, self.folder = program, folder
        folder.mkdir(parents=True, mode=0o711)
        self.environment = dict(os.environ, COLLECTIVE_DATA=str(folder / "a"), COLLECTIVE_CONFIG=str(folder / "config"),
                                COLLECTIVE_CACHE=str(folder / "cache"))
        for name in ("COLLECTIVE_URL", "COLLECTIVE_TOKEN"):
            self.environment.pop(name, None)
        arguments = [program, "up", "--tcg", "--name", "a"] + (["--listen", listen] if listen else []) + list(more)
        log = open(folder / "up.log", "w")
        self.up = subprocess.Popen(arguments, env=self.environment, stdout=log, stderr=log)
        until("the plane is up", lambda: run(program, "status", "--json", env=self.environment, check=False).output.count('"reachable":true') > 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Ends the daemons, and then the machines: most have no system that would switch itself off when asked."""
        self.up.send_signal(signal.SIGTERM)
        self.up.wait()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder) in (process / "cmdline").read_text().replace("\0", " ") and int(process.name) != os.getpid():
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith(str(self.folder)):
                run("umount", "-l", line.split()[1], check=False)

    def run(self, *arguments):
        """With the plane's CPU."""
        return run(self.program, *arguments, env=self.environment, also=[self.up.pid])

    def json(self, *arguments):
        return json.loads(self.run(*arguments, "--json").output or "null")

    def publish(self, folder, *more):
        """Its cost, and what it said."""
        cost = self.run("publish", folder, "--json", *more)
        return cost, json.loads(cost.output)

    def stored(self):
        return size_of(self.folder / "a/plane/store")


def until(what, condition, limit=120):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {limit} s")
        time.sleep(0.1)


def update(program, folder, first, second, boots=False):
    """What a host that has all of `first` plans to fetch for `second`; where the machine boots, also that this is what the update fetches."""
    with Site(program, folder) as site:
        _, one = site.publish(first)
        appliance = one["appliance"]
        site.json("launch", f"{appliance}:{one['version']}", "--name", "n", "--network", "none")
        until("everything is fetched", lambda: site.json("info", "n")["frames_missing"] == 0)
        before = site.stored()
        cost, two = site.publish(second)
        plan = site.json("plan", "n", "--to", two["version"])
        if boots:
            done = site.json("update", "n", "--to", two["version"])
            if done["bytes_fetched"] != plan["bytes_to_fetch"]:
                raise SystemExit(f"the plan was {plan['bytes_to_fetch']} and {done['bytes_fetched']} bytes moved")
        return {"plan": plan, "publish": cost, "stored": site.stored() - before, "summary": two}


def fetch(site, reference, to):
    """A whole disk into a raw file, from an empty cache."""
    to.unlink(missing_ok=True)
    return run(site.program, "export", reference, to, env=site.environment, also=[site.up.pid])


class Volume:
    """The disks of a version, mounted."""

    def __init__(self, site, reference, folder):
        folder.mkdir()
        self.disk = folder / "system"
        command = [site.program, "mount", reference, folder, "--scratch", site.folder, "--quiet"]
        self.child = subprocess.Popen(command, env=site.environment, stdout=subprocess.DEVNULL)
        until("the volume is mounted", self.disk.exists)

    def __enter__(self):
        return self.disk

    def __exit__(self, *_):
        self.child.send_signal(signal.SIGTERM)
        self.child.wait()


class Link:
    """Between us and a network namespace, on which another host lives."""

    SPACE, OURS, THEIRS = "collective-bench", "cl-bench0", "cl-bench1"
    ADDRESS = "10.231.7.1"

    def __enter__(self):
        ip = lambda *words: run("ip", *words)
        try:
            ip("netns", "add", self.SPACE)
            ip("link", "add", self.OURS, "type", "veth", "peer", "name", self.THEIRS, "netns", self.SPACE)
            ip("address", "add", f"{self.ADDRESS}/24", "dev", self.OURS)
            ip("link", "set", self.OURS, "up")
            for words in (["address", "add", "10.231.7.2/24", "dev", self.THEIRS], ["link", "set", self.THEIRS, "up"], ["link", "set", "lo", "up"]):
                ip("-n", self.SPACE, *words)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        run("ip", "netns", "del", self.SPACE, check=False)
        run("ip", "link", "del", self.OURS, check=False)

    def there(self, *words):
        return ["ip", "netns", "exec", self.SPACE, *words]

    def shape(self, kbit):
        """Both ways."""
        words = ["root", "tbf", "rate", f"{kbit}kbit", "burst", "8kb", "latency", "400ms"]
        run("tc", "qdisc", "add", "dev", self.OURS, *words)
        run(*self.there("tc", "qdisc", "add", "dev", self.THEIRS, *words))

    def free(self):
        run("tc", "qdisc", "del", "dev", self.OURS, "root", check=False)
        run(*self.there("tc", "qdisc", "del", "dev", self.THEIRS, "root"), check=False)

    def received(self):
        return int(run(*self.there("cat", f"/sys/class/net/{self.THEIRS}/statistics/rx_bytes")).output)


class ThinHost:
    """A site, and a second host `b` behind a link; gives both."""

    def __init__(self, program, folder):
        self.program, self.folder, self.host = program, folder, None

    def __enter__(self):
        self.link = Link().__enter__()
        self.site = None
        try:
            self.site = Site(self.program, self.folder, listen=f"{Link.ADDRESS}:0")
            token = self.site.run("token", "create").output.strip()
            log = open(self.folder / "b.log", "w")
            join = self.link.there(self.program, "host", "join", token, "--name", "b", "--tcg", "--data", self.folder / "b")
            self.host = subprocess.Popen(join, env=self.site.environment, stdout=log, stderr=log)
            until("the host has joined", lambda: any(h["name"] == "b" and h["reachable"] and h["facts"] for h in self.site.json("status")["hosts"]))
        except BaseException:
            self.__exit__()
            raise
        return self.site, self.link

    def __exit__(self, *_):
        if self.host:
            self.host.send_signal(signal.SIGTERM)
            self.host.wait()
        if self.site:
            self.site.__exit__()
        self.link.__exit__()


def thin_launch(program, folder, version, kbit):
    """A cold launch on a host behind a link of `kbit` kbit/s: seconds to the first answer, and bytes from the host's side."""
    with ThinHost(program, folder) as (site, link):
        _, published = site.publish(version)
        link.shape(kbit)
        before, begun = link.received(), time.monotonic()
        site.json("launch", published["appliance"], "--name", "n", "--host", "b")
        until("it answers", lambda: site.json("info", "n")["health"] == "healthy", limit=3600)
        wall, moved = time.monotonic() - begun, link.received() - before
        info = site.json("info", "n")
        link.free()
        site.run("delete", "n", "--data")
        return wall, moved, info


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

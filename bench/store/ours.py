"""Our side of the store's benchmark: planes, publishes, fetches, volumes, and a launch over a thin link."""

import json
import os
import signal
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

    def __init__(self, program, folder, listen=None):
        self.program, self.folder = program, folder
        folder.mkdir(parents=True, mode=0o711)
        self.environment = dict(os.environ, COLLECTIVE_DATA=str(folder / "a"), COLLECTIVE_CONFIG=str(folder / "config"),
                                COLLECTIVE_CACHE=str(folder / "cache"))
        for name in ("COLLECTIVE_URL", "COLLECTIVE_TOKEN"):
            self.environment.pop(name, None)
        arguments = [program, "up", "--tcg", "--name", "a"] + (["--listen", listen] if listen else [])
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


def thin_launch(program, folder, version, kbit):
    """A cold launch on a host behind a link of `kbit` kbit/s: seconds to the first answer, and bytes from the host's side."""
    space, ours, theirs = "collective-bench", "cl-bench0", "cl-bench1"
    ip = lambda *words: run("ip", *words)
    ip("netns", "add", space)
    host = None
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", space)
        ip("address", "add", "10.231.7.1/24", "dev", ours)
        ip("link", "set", ours, "up")
        for words in (["address", "add", "10.231.7.2/24", "dev", theirs], ["link", "set", theirs, "up"], ["link", "set", "lo", "up"]):
            ip("-n", space, *words)
        shape = ["root", "tbf", "rate", f"{kbit}kbit", "burst", "8kb", "latency", "400ms"]
        with Site(program, folder, listen="10.231.7.1:0") as site:
            _, published = site.publish(version)
            token = site.run("token", "create").output.strip()
            log = open(folder / "b.log", "w")
            join = ["ip", "netns", "exec", space, program, "host", "join", token, "--name", "b", "--tcg", "--data", folder / "b"]
            host = subprocess.Popen(join, env=site.environment, stdout=log, stderr=log)
            until("the host has joined", lambda: any(h["name"] == "b" and h["reachable"] and h["facts"] for h in site.json("status")["hosts"]))
            run("tc", "qdisc", "add", "dev", ours, *shape)
            run("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", theirs, *shape)
            received = lambda: int(run("ip", "netns", "exec", space, "cat", f"/sys/class/net/{theirs}/statistics/rx_bytes").output)
            before, begun = received(), time.monotonic()
            site.json("launch", published["appliance"], "--name", "n", "--host", "b")
            until("it answers", lambda: site.json("info", "n")["health"] == "healthy", limit=3600)
            wall, moved = time.monotonic() - begun, received() - before
            info = site.json("info", "n")
            run("tc", "qdisc", "del", "dev", ours, "root")
            run("ip", "netns", "exec", space, "tc", "qdisc", "del", "dev", theirs, "root")
            site.run("delete", "n", "--data")
        return wall, moved, info
    finally:
        if host:
            host.send_signal(signal.SIGTERM)
            host.wait()
        run("ip", "netns", "del", space, check=False)
        run("ip", "link", "del", ours, check=False)

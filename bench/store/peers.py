"""The peers: what they store, move and cost for the same disks. A peer that is not installed is named and left out."""

import os
import re
import shutil

from lib import have, run, say


class Casync:
    name, tool = "casync", "casync"

    def __init__(self, folder):
        self.folder, self.store = folder, folder / "store.castr"

    def add(self, name, disk):
        return run("casync", "make", f"--store={self.store}", self.folder / f"{name}.caibx", disk)

    def take(self, name, to):
        return run("casync", "extract", f"--store={self.store}", self.folder / f"{name}.caibx", to)


class Restic:
    name, tool = "restic", "restic"

    def __init__(self, folder):
        self.folder, self.store = folder, folder / "repository"
        self.environment = dict(os.environ, RESTIC_PASSWORD="bench", RESTIC_REPOSITORY=str(self.store), RESTIC_CACHE_DIR=str(folder / "cache"))
        run("restic", "init", env=self.environment)

    def add(self, name, disk):
        # Always under the same name, so that it finds its parent.
        link = self.folder / "disk.raw"
        link.unlink(missing_ok=True)
        os.link(disk, link)
        return run("restic", "backup", "--tag", name, link, env=self.environment)

    def take(self, name, to):
        target = to.with_suffix(".restic")
        cost = run("restic", "restore", "latest", "--tag", name, "--target", target, env=self.environment)
        next(target.rglob("disk.raw")).rename(to)
        shutil.rmtree(target)
        return cost


class Borg:
    name, tool = "borg, zstd -3", "borg"
    compression = "zstd,3"

    def __init__(self, folder):
        self.folder, self.store = folder, folder / "repository"
        self.environment = dict(os.environ, BORG_BASE_DIR=str(folder / "home"), BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes")
        (folder / "home").mkdir()
        run("borg", "init", "-e", "none", self.store, env=self.environment)

    def add(self, name, disk):
        link = self.folder / "disk.raw"
        link.unlink(missing_ok=True)
        os.link(disk, link)
        return run("borg", "create", "-C", self.compression, f"{self.store}::{name}", "disk.raw", env=self.environment, cwd=self.folder)

    def take(self, name, to):
        cost = run("borg", "extract", "--sparse", f"{self.store}::{name}", env=self.environment, cwd=to.parent)
        (to.parent / "disk.raw").rename(to)
        return cost


class BorgLz4(Borg):
    name, compression = "borg, lz4", "lz4"


class Qcow2:
    """One file; a version on top of another is a file of the clusters that differ."""

    name, tool = "qcow2, zstd", "qemu-img"

    def __init__(self, folder):
        self.store = folder

    def add(self, name, disk):
        options = ["-O", "qcow2", "-c", "-o", "compression_type=zstd"]
        base = self.store / "v1.qcow2"
        if base.exists():
            options += ["-B", base, "-F", "qcow2"]
        return run("qemu-img", "convert", *options, disk, self.store / f"{name}.qcow2")

    def take(self, name, to):
        return run("qemu-img", "convert", "-O", "raw", self.store / f"{name}.qcow2", to)


ALL = [Casync, Restic, Borg, BorgLz4, Qcow2]


def installed():
    for peer in ALL:
        if have(peer.tool):
            yield peer
        else:
            say(f"  {peer.name}: {peer.tool} is not installed, left out")


def rsync_bytes(old, new, work):
    """Bytes of `rsync -z` from new to a copy of old, both ways, and its cost."""
    copy = work / "rsync.raw"
    run("cp", "--sparse=always", old, copy)
    cost = run("rsync", "-z", "--inplace", "--no-whole-file", "--stats", new, copy)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"Total bytes (?:sent|received): ([\d,]+)", cost.output)]
    copy.unlink()
    return sum(numbers), cost


def patch_bytes(old, new, work, level=3):
    """Bytes of `zstd --patch-from` with holes squeezed out, as one fixed pair, and its cost."""
    dense = []
    for disk in (old, new):
        to = work / f"dense-{disk.stem}"
        if not to.exists():
            squeeze(disk, to)
        dense.append(to)
    patch = work / "patch.zst"
    cost = run("zstd", f"-{level}", "-f", "-q", "--long=31", f"--patch-from={dense[0]}", dense[1], "-o", patch)
    return patch.stat().st_size, cost


def squeeze(disk, to):
    with open(disk, "rb") as source, open(to, "wb") as out:
        at, end = 0, disk.stat().st_size
        while at < end:
            try:
                start = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(source.fileno(), start, os.SEEK_HOLE)
            source.seek(start)
            left = at - start
            while left:
                chunk = source.read(min(left, 1 << 20))
                out.write(chunk)
                left -= len(chunk)

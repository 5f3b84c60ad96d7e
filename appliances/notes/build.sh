#!/bin/bash
# Builds the appliance "notes": Debian 12, systemd, nginx, SSH, as a disk that boots by its own boot loader.
#   version 1  bookworm as released
#   version 2  version 1's tree, brought up to date from bookworm-security and bookworm-updates
#   version 3  version 2's tree with a broken nginx and a unit that damages the data, on purpose
#
# Same packages => same bytes, as far as the host's file system lists a directory in the same order twice (mke2fs -d
# takes that order). That holds for two builds on one machine with the same WORK; between machines the bytes may differ.
# Trees are kept in WORK; remove it, or tree-*.tar there, to build from the mirror's present packages.
set -euo pipefail
umask 022
export LC_ALL=C E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH DEBIAN_FRONTEND=noninteractive
export INITRD=No # the kernel's scripts make no initrd: ours is below
PATH=$PATH:/usr/sbin:/sbin
NAME=notes SUITE=bookworm SIZE=1024 # MiB
HERE=$PWD
fail() { echo "$NAME: $*" >&2; exit 1; }
trap 'echo "$NAME: line $LINENO of build.sh failed: $BASH_COMMAND" >&2' ERR

case $VERSION in 1 | 2 | 3) ;; *) fail "no version $VERSION; there are 1, 2 and 3" ;; esac
for tool in mmdebstrap mke2fs debugfs cpio sfdisk grub-mkimage dpkg-deb apt-get tar chroot; do
    command -v "$tool" >/dev/null || fail "no $tool here; install: mmdebstrap e2fsprogs cpio fdisk grub-common grub-pc-bin"
done
GRUB=/usr/lib/grub/i386-pc
[ -f $GRUB/boot.img ] || fail "no $GRUB; install grub-pc-bin"
if [ "$(id -u)" != 0 ]; then
    # An ordinary user becomes root in a user namespace of his own (needs uidmap and lines in /etc/subuid, /etc/subgid).
    unshare --map-auto --map-root-user true 2>/dev/null ||
        fail "neither root nor able to make a user namespace; install uidmap, give this user lines in /etc/subuid and /etc/subgid, or run as root"
    exec unshare --map-auto --map-root-user --mount --pid --fork --kill-child "$0"
fi

# ---- where Debian comes from: what this machine's apt uses, be it Debian or another system with a Debian source ----
sources() { # LABEL SUITE -> a line of sources.list
    local uri
    uri=$(apt-get indextargets --format '$(CREATED_BY)|$(LABEL)|$(REPO_URI)' | sed -n "s/^Packages|$1|//p" | sort -u | head -1)
    [ -n "$uri" ] || return 0
    echo "deb [signed-by=$KEYRING] $uri $2 main"
}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
check_sources() {
    [ -f $KEYRING ] || fail "no $KEYRING; install debian-archive-keyring"
    BASE=$(sources Debian $SUITE)
    [ -n "$BASE" ] || fail "apt on this machine knows no Debian mirror; add a source of Debian ($SUITE main, signed by $KEYRING) and run apt-get update"
    UPDATES=$(sources Debian $SUITE-updates)
    SECURITY=$(sources Debian-Security $SUITE-security)
    APTOPTS=()
    while read -r line; do APTOPTS+=("--aptopt=$line"); done < <(apt-config dump | grep -E '^Acquire::(http|https)::Proxy ' || true)
}

PACKAGES=systemd-sysv,udev,kmod,linux-image-cloud-amd64,busybox-static,e2fsprogs,iproute2,acpid,nginx,openssh-server,ca-certificates
STAMP=$(sed -n '/^PACKAGES=/,/^# ---- end of trees/p' "$HERE/build.sh" | sha256sum | cut -c1-16)-$SOURCE_DATE_EPOCH
mkdir -p "$WORK/debs"
# mmdebstrap makes or changes a tree; the .deb files come from and go to WORK/debs. A sorted tar comes out.
tree() { # OUTPUT ARGUMENT...
    local out=$1; shift
    mmdebstrap --quiet --mode=root --format=tar --skip=essential/unlink \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt='path-exclude=/usr/share/bug/*' \
        --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' --aptopt='APT::Sandbox::User "root"' \
        "${APTOPTS[@]}" "$@" "$SUITE" "$out.part" "${SOURCES[@]}" >&2 ||
        fail "mmdebstrap failed (its words are above); is the mirror reachable, has apt-get update been run?"
    mv "$out.part" "$out"
    echo "$STAMP" >"$out.stamp"
}
have() { [ -f "$1" ] && [ "$(cat "$1.stamp" 2>/dev/null)" = "$STAMP" ]; }
CACHE_IN="mkdir -p \"\$1/var/cache/apt/archives/partial\"; find '$WORK/debs' -name '*.deb' -exec cp -t \"\$1/var/cache/apt/archives\" {} +"
CACHE_OUT="find \"\$1/var/cache/apt/archives\" -name '*.deb' -exec cp -n -t '$WORK/debs' {} +"

need_tree_1() {
    have "$WORK/tree-1.tar" && return
    check_sources
    SOURCES=("$BASE")
    tree "$WORK/tree-1.tar" --variant=apt --include="$PACKAGES" --setup-hook="$CACHE_IN" --customize-hook="$CACHE_OUT"
}

need_tree_2() {
    need_tree_1
    have "$WORK/tree-2.tar" && return
    check_sources
    rm -f "$WORK/update-debs.json" "$WORK/update-notes"
    export CACHE=$WORK NAME
    cat >"$WORK/upgrade.sh" <<'U'
set -eu
unset APT_CONFIG
root=$1
a="chroot $root apt-get -q -y -o Dpkg::Options::=--force-confold"
rm -f "$root"/var/cache/apt/archives/*.deb
$a update
list() { $a --print-uris "$@" | sed -n "s/^'[^']*' \([^ ]*\.deb\) \([0-9]*\) .*/\1 \2/p"; }
want=dist-upgrade
[ -n "$(list $want)" ] || {
    echo "the mirror offers no updates for version 1: version 2 adds the package less instead" >>"$CACHE/update-notes"
    want="install less"
}
list $want | awk '
    { all += $2; n++; if ($1 ~ /^linux-image-/) kernel += $2 }
    END {
        printf "update debs %d bytes, without kernel %d\n", all, all - kernel >>(ENVIRON["CACHE"] "/update-notes")
        printf "{\"debs\": %d, \"bytes\": %d, \"bytes_without_kernel\": %d}\n", n, all, all - kernel >(ENVIRON["CACHE"] "/update-debs.json")
    }'
find "$CACHE/debs" -name '*.deb' -exec cp -t "$root/var/cache/apt/archives" {} +
$a $want
# Only the kernel that the meta package wants remains.
keep=$(chroot "$root" dpkg-query -W -f '${Depends}\n' linux-image-cloud-amd64 | grep -o 'linux-image-[0-9][^ ,]*')
for k in $(chroot "$root" dpkg-query -W -f '${Package}\n' 'linux-image-[0-9]*'); do
    [ "$k" = "$keep" ] || $a purge "$k"
done
$a autoremove --purge
U
    SOURCES=()
    for s in "$BASE" "$SECURITY" "$UPDATES"; do [ -z "$s" ] || SOURCES+=("$s"); done
    [ -n "$SECURITY" ] || echo "apt on this machine has no Debian security source: version 2 lacks security updates" >>"$WORK/update-notes"
    printf '%s\n' "${SOURCES[@]}" >"$WORK/sources.list"
    tree "$WORK/tree-2.tar" --variant=custom --skip=check/empty,setup,update,cleanup \
        --setup-hook="tar -x --numeric-owner -p --xattrs --xattrs-include='*' -C \"\$1\" -f '$WORK/tree-1.tar'" \
        --customize-hook="rm -f \"\$1\"/etc/apt/sources.list.d/*; cp '$WORK/sources.list' \"\$1/etc/apt/sources.list\"" \
        --customize-hook="sh '$WORK/upgrade.sh' \"\$1\"" --customize-hook="$CACHE_OUT" \
        --customize-hook='rm -f "$1"/var/cache/apt/archives/*.deb'
}
# ---- end of trees ----

if [ "$VERSION" = 1 ]; then
    need_tree_1
    BASE_TREE=$WORK/tree-1.tar
else
    need_tree_2
    BASE_TREE=$WORK/tree-2.tar
    if [ "$VERSION" = 2 ]; then
        cp "$WORK/update-debs.json" "$OUT/update-debs.json"
        sed 's/^/note: /' "$WORK/update-notes"
    else
        echo "note: version 3 is broken on purpose: nginx does not start, and the notes are damaged"
    fi
fi

T=$WORK/tmp; rm -rf "$T"; mkdir -p "$T"
R=$T/root; mkdir "$R"
trap 'rm -rf "$T"' EXIT
tar -x --numeric-owner -p --xattrs --xattrs-include='*' --exclude='./dev/*' -C "$R" -f "$BASE_TREE"

# ---- what this appliance adds ----
put() { install -D -m "$1" "$HERE/files/$2" "$R/$3"; }
put 755 notes-prepare usr/lib/notes/prepare
put 644 notes-prepare.service etc/systemd/system/notes-prepare.service
put 644 index.html usr/share/notes/index.html
put 644 nginx.conf etc/nginx/nginx.conf
put 644 sshd.conf etc/ssh/sshd_config.d/10-collective.conf
# What tells a machine that goes on from a saved state the time, and who it is.
cp -r "$GUEST/." "$R/"
sed -i "s/@VERSION@/$VERSION/g" "$R/usr/share/notes/index.html" "$R/etc/nginx/nginx.conf"
echo "$VERSION" >"$R/etc/notes-version"
mkdir -p "$R/data"
cat >"$R/etc/fstab" <<'F'
LABEL=notes-system /     ext4 defaults,errors=remount-ro 0 1
# sync: a note that was acknowledged is on the disk. nofail: without its data the appliance starts and says so. The times are
# those of a boot whose disks come over a thin link, like DefaultTimeoutStartSec below.
LABEL=notes-data   /data ext4 sync,nofail,x-systemd.growfs,x-systemd.device-timeout=15min,x-systemd.mount-timeout=15min 0 2
F
cat >"$R/etc/systemd/network/80-dhcp.network" <<'F'
[Match]
Name=en* eth*
[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no
[DHCPv4]
UseHostname=no
ClientIdentifier=mac
F
mkdir -p "$R"/etc/systemd/{journald.conf.d,system/nginx.service.d,system/systemd-udev-trigger.service.d,system.conf.d} "$R/etc/acpi/events"
# The initramfs loads the drivers of this virtual hardware, so only what systemd waits for has to pass through udev at
# boot (all devices take 5 s under emulation). What is plugged in later is handled as usual.
cat >"$R/etc/systemd/system/systemd-udev-trigger.service.d/notes.conf" <<'F'
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=block --subsystem-match=net --subsystem-match=input --subsystem-match=virtio-ports
ExecStart=-udevadm trigger --action=add --name-match=/dev/ttyS0
F
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n' >"$R/etc/systemd/journald.conf.d/volatile.conf"
printf '[Manager]\nDefaultTimeoutStartSec=15min\nDefaultTimeoutStopSec=10s\nShowStatus=yes\n' >"$R/etc/systemd/system.conf.d/notes.conf"
# The configuration was tested when the appliance was made: no second nginx for that at every boot.
printf '[Unit]\nAfter=notes-prepare.service\n[Service]\nExecStartPre=\n' >"$R/etc/systemd/system/nginx.service.d/notes.conf"
printf 'event=button/power.*\naction=/bin/systemctl poweroff\n' >"$R/etc/acpi/events/power"
unit() { systemctl --quiet --root="$R" "$@" >&2; }
command -v systemctl >/dev/null || unit() { chroot "$R" systemctl --quiet "$@" >&2; }
unit enable notes-prepare.service nginx.service ssh.socket systemd-networkd.service acpid.service serial-getty@ttyS0.service
unit disable ssh.service systemd-networkd-wait-online.service acpid.socket acpid.path || true
# The instance's identity comes from the host, time from its clock, entropy from virtio-rng; logs stay in memory;
# updates come as whole versions. What else Debian would start is not needed and costs seconds under emulation.
unit mask systemd-machine-id-commit.service systemd-random-seed.service systemd-logind.service systemd-journal-flush.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-binfmt.service systemd-pstore.service \
    systemd-timesyncd.service systemd-networkd-wait-online.service systemd-firstboot.service getty@tty1.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer \
    modprobe@configfs.service modprobe@drm.service modprobe@fuse.service modprobe@efi_pstore.service modprobe@dm_mod.service modprobe@loop.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount sys-kernel-config.mount \
    proc-sys-fs-binfmt_misc.automount rsync.service ldconfig.service systemd-hwdb-update.service systemd-sysusers.service systemd-pcrphase.service \
    systemd-pcrphase-sysinit.service systemd-boot-update.service getty-static.service systemd-network-generator.service \
    systemd-modules-load.service plymouth-start.service plymouth-quit-wait.service
if [ "$VERSION" = 3 ]; then
    put 644 notes-damage.service etc/systemd/system/notes-damage.service
    unit enable notes-damage.service
    sed -i '1i this_directive_is_broken_on_purpose;' "$R/etc/nginx/nginx.conf"
else
    # (its test listens on port 80: not in this machine's network)
    unshare --net chroot "$R" nginx -t -q -c /etc/nginx/nginx.conf -g 'error_log stderr;' >&2 || fail "nginx refuses files/nginx.conf (see above)"
    rm -f "$R/run/nginx.pid"
fi

# ---- nothing of the maker's machine, nothing of one build ----
rm -rf "$R"/etc/apt/sources.list "$R"/etc/apt/sources.list.d/* "$R"/etc/apt/apt.conf.d/99mmdebstrap "$R"/etc/ssh/ssh_host_* "$R"/etc/hostname \
    "$R"/var/lib/apt/lists "$R"/var/cache/* "$R"/var/log/* "$R"/var/backups/* "$R"/var/lib/systemd/{random-seed,catalog,deb-systemd-helper-masked} \
    "$R"/tmp/* "$R"/run/* "$R"/var/tmp/* "$R"/etc/*- "$R"/var/lib/dpkg/*-old "$R"/usr/share/doc "$R"/usr/share/man \
    "$R"/var/lib/dbus/machine-id "$R"/data/* "$R"/data/.upload "$R"/etc/initramfs-tools/conf.d/resume "$R"/var/lib/initramfs-tools
rm -f "$R"/boot/initrd.img-* "$R"/initrd.img "$R"/initrd.img.old "$R"/vmlinuz.old
mkdir -p "$R"/var/log/nginx "$R"/var/lib/apt/lists/partial "$R"/var/cache/apt/archives/partial
: >"$R/etc/machine-id"
: >"$R/etc/resolv.conf"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$R/etc/hosts"

# ---- initrd: not compressed, largest and most stable file first ----
# Compressed, every byte of it would be new with each kernel; like this, busybox (most of it) keeps its blocks from version
# to version, and the store compresses it anyway. It is small: this virtual hardware's drivers, and FAT for the seed disk.
kernel=$(cd "$R/lib/modules" && ls)
[ "$(echo "$kernel" | wc -w)" = 1 ] || fail "there should be one kernel, found: $kernel"
I=$T/initrd; mkdir -p "$I"/{bin,dev,proc,sys,run,root,seed,modules}
cp "$R/bin/busybox" "$I/bin/busybox"
ln -s busybox "$I/bin/sh"
for a in mount umount insmod cat cp chmod tr mkdir hostname findfs switch_root; do ln -s busybox "$I/bin/$a"; done
install -m 755 files/init "$I/init"
for m in drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev \
         drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci drivers/block/virtio_blk \
         net/core/failover drivers/net/net_failover drivers/net/virtio_net drivers/char/hw_random/virtio-rng \
         drivers/virtio/virtio_balloon drivers/acpi/button drivers/input/evdev fs/nls/nls_cp437 fs/nls/nls_ascii fs/fat/fat fs/fat/vfat; do
    cp "$R/lib/modules/$kernel/kernel/$m.ko" "$I/modules/" || fail "the kernel has no module $m; adapt the list in build.sh"
    basename "$m" >>"$I/modules/order"
done
find "$I" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
(cd "$I" && { echo ./bin; echo ./bin/busybox; find . ! -path ./bin ! -path ./bin/busybox | sort; } |
    cpio -o -H newc --reproducible --owner=0:0 --quiet) >"$R/boot/initrd.img-$kernel"
ln -s "boot/initrd.img-$kernel" "$R/initrd.img"
[ -e "$R/vmlinuz" ] || ln -s "boot/vmlinuz-$kernel" "$R/vmlinuz"
find "$R" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

# ---- disks ----
# Time stamps that mke2fs -d takes from the host (change times) are set afterwards, inode by inode.
filesystem() { # FILE LABEL UUID-END TREE MiB
    truncate -s "$5M" "$1"
    mke2fs -q -F -t ext4 -b 4096 -L "$2" -U "6e6f7465-7300-4000-8000-0000000000$3" -m 1 -J size=16 ${4:+-d "$4"} \
        -E "hash_seed=6e6f7465-7300-4000-8000-0000000001$3,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0" "$1" >&2
    local used
    used=$(dumpe2fs -h "$1" 2>/dev/null | awk '/^Inode count:/{c=$3} /^Free inodes:/{f=$3} END{print c-f}')
    for ((i = 2; i <= used; i++)); do
        [ $i -gt 2 ] && [ $i -lt 11 ] || echo "sif <$i> ctime @$SOURCE_DATE_EPOCH"
        [ $i -gt 2 ] && [ $i -lt 11 ] || echo "sif <$i> atime @$SOURCE_DATE_EPOCH"
    done >"$T/debugfs"
    debugfs -w -f "$T/debugfs" "$1" >/dev/null 2>"$T/debugfs.log"
    ! grep -v '^debugfs' "$T/debugfs.log" >&2 || fail "debugfs could not set the time stamps (see above)"
}
filesystem "$T/part" notes-system "0$VERSION" "$R" $((SIZE - 1))
filesystem "$OUT/data.raw" notes-data da "" 256

# GRUB's core in the gap before the first partition, no menu. linux16 rather than linux: the latter moves the kernel's
# whole run-time size byte by byte, which takes 3 s under emulation.
cat >"$T/early.cfg" <<'G'
linux16 /vmlinuz console=ttyS0 loglevel=5 nokaslr tsc=reliable no_timer_check cryptomgr.notests audit=0 apparmor=0 initcall_blacklist=crypto_kdf108_init,init_kprobe_trace
initrd16 /initrd.img
boot
G
grub-mkimage -O i386-pc -c "$T/early.cfg" -p '(,msdos1)/boot/grub' -o "$T/core.img" biosdisk part_msdos ext2 linux16
[ "$(stat -c %s "$T/core.img")" -le $((2047 * 512)) ] || fail "GRUB's core.img does not fit before the first partition"
D=$OUT/system.raw
truncate -s "${SIZE}M" "$D"
printf 'label: dos\nlabel-id: 0x6e6f7400\nstart=2048, type=83, bootable\n' | sfdisk -q "$D" >&2
dd if=$GRUB/boot.img of="$D" bs=440 count=1 conv=notrunc status=none
dd if="$T/core.img" of="$D" bs=512 seek=1 conv=notrunc status=none
dd if="$T/part" of="$D" bs=1M seek=1 conv=notrunc,sparse status=none

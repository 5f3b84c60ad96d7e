#!/bin/bash
# Builds the guest "cloud": Debian 12 as its packages make it, with cloud-init, Debian's own initrd and GRUB. Nothing in
# it was made for Collective. Version 2 is version 1 with another /srv/version, so that it costs no second Debian.
# The Debian is kept in WORK; remove it there to build from the mirror's present packages.
set -euo pipefail
umask 022
export LC_ALL=C E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
PATH=$PATH:/usr/sbin:/sbin
fail() { echo "cloud: $*" >&2; exit 1; }
trap 'echo "cloud: line $LINENO of build.sh failed: $BASH_COMMAND" >&2' ERR

for tool in mmdebstrap mke2fs debugfs sfdisk grub-mkimage apt-get; do
    command -v "$tool" >/dev/null || fail "no $tool here; install: mmdebstrap e2fsprogs fdisk grub-common"
done
GRUB=/usr/lib/grub/i386-pc KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f $GRUB/boot.img ] || fail "no $GRUB; install grub-pc-bin"
[ -f $KEYRING ] || fail "no $KEYRING; install debian-archive-keyring"
[ "$(id -u)" = 0 ] || fail "mmdebstrap --mode=root needs root"

# ---- Debian, once ----
P=$WORK/part-$(sha256sum build.sh | cut -c1-16)
if [ ! -f "$P" ]; then
    rm -f "$WORK"/part-*
    uri=$(apt-get indextargets --format '$(CREATED_BY)|$(LABEL)|$(REPO_URI)' | sed -n 's/^Packages|Debian|//p' | sort -u | head -1)
    [ -n "$uri" ] || fail "apt on this machine knows no Debian mirror; add a source of Debian (bookworm main) and run apt-get update"
    proxy=()
    while read -r line; do proxy+=("--aptopt=$line"); done < <(apt-config dump | grep -E '^Acquire::(http|https)::Proxy ' || true)
    R=$WORK/root; rm -rf "$R"
    mmdebstrap --quiet --mode=root --variant=apt --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --aptopt='APT::Install-Recommends "false"' "${proxy[@]}" \
        --include=systemd-sysv,udev,dbus,linux-image-cloud-amd64,initramfs-tools,busybox-static,e2fsprogs,iproute2,openssh-server,sudo,cloud-init \
        bookworm "$R" "deb [signed-by=$KEYRING] $uri bookworm main" >&2 || fail "mmdebstrap failed (its words are above)"

    # What an image for clouds has and no package brings: where the root is, a network manager that cloud-init knows,
    # the power button, and here something that serves /srv.
    echo "LABEL=cloud-system / ext4 defaults 0 1" >"$R/etc/fstab"
    cat >"$R/etc/systemd/system/www.service" <<'U'
[Unit]
Description=Serves /srv
[Service]
ExecStart=/bin/busybox httpd -f -p 80 -h /srv
[Install]
WantedBy=multi-user.target
U
    chroot "$R" systemctl --quiet enable systemd-networkd.service www.service >&2
    chroot "$R" systemctl --quiet mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer >&2
    rm -rf "$R"/etc/apt/sources.list "$R"/etc/apt/apt.conf.d/99mmdebstrap "$R"/etc/ssh/ssh_host_* "$R"/etc/hostname "$R"/var/cache/apt/*.bin \
        "$R"/var/cache/apt/archives/*.deb "$R"/var/lib/apt/lists/* "$R"/var/log/* "$R"/var/lib/dbus/machine-id
    : >"$R/etc/machine-id"
    truncate -s 1535M "$P.new"
    mke2fs -q -F -t ext4 -L cloud-system -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d "$R" "$P.new" >&2
    rm -rf "$R"
    mv "$P.new" "$P"
fi

# ---- the version's disk: GRUB in the gap before the first partition, as in the guest "tiny" ----
D=$OUT/system.raw T=$WORK/tmp; rm -rf "$T"; mkdir -p "$T"
echo "$VERSION" >"$T/version"
cp --sparse=always "$P" "$T/part"
debugfs -w -R "write $T/version srv/version" "$T/part" 2>"$T/debugfs.log"
cat >"$T/early.cfg" <<'G'
linux16 /vmlinuz root=LABEL=cloud-system ro console=ttyS0
initrd16 /initrd.img
boot
G
grub-mkimage -O i386-pc -c "$T/early.cfg" -p '(,msdos1)/boot/grub' -o "$T/core.img" biosdisk part_msdos ext2 linux16
truncate -s 1536M "$D"
printf 'label: dos\nlabel-id: 0x636c6f75\nstart=2048, type=83, bootable\n' | sfdisk -q "$D" >&2
dd if=$GRUB/boot.img of="$D" bs=440 count=1 conv=notrunc status=none
dd if="$T/core.img" of="$D" bs=512 seek=1 conv=notrunc status=none
dd if="$T/part" of="$D" bs=1M seek=1 conv=notrunc,sparse status=none
rm -rf "$T"

#!/bin/bash
# Builds the guest "tiny": a complete disk that boots by its own boot loader, from BIOS and from UEFI, and an empty
# data disk.
# Same packages, same compiler => same bytes.
set -euo pipefail
umask 022
export LC_ALL=C E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
PATH=$PATH:/usr/sbin:/sbin
fail() { echo "tiny: $*" >&2; exit 1; }
trap 'echo "tiny: line $LINENO of build.sh failed: $BASH_COMMAND" >&2' ERR

for tool in gcc mke2fs debugfs cpio gzip sfdisk mformat mcopy grub-mkimage dpkg-deb apt-get apt-cache; do
    command -v "$tool" >/dev/null || fail "no $tool here; install: gcc libc6-dev e2fsprogs cpio gzip fdisk mtools grub-common dpkg apt"
done
GRUB=/usr/lib/grub
[ -f $GRUB/i386-pc/boot.img ] || fail "no $GRUB/i386-pc; install grub-pc-bin"
[ -f $GRUB/x86_64-efi/linux.mod ] || fail "no $GRUB/x86_64-efi; install grub-efi-amd64-bin"

# ---- packages, fetched once ----
DEBS=$WORK/debs TREE=$WORK/packages
if [ ! -f "$TREE/complete" ]; then
    rm -rf "$TREE"; mkdir -p "$DEBS" "$TREE"
    if ! ls "$DEBS"/linux-image-*.deb "$DEBS"/busybox-static_*.deb >/dev/null 2>&1; then
        kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | sort -V | tail -1)
        [ -n "$kernel" ] || fail "apt knows no linux-image-cloud-amd64; run apt-get update, with Debian 12 in the sources"
        (cd "$DEBS" && apt-get download -q "$kernel" busybox-static) >&2 || fail "apt-get download failed (see above); run apt-get update and try again"
    fi
    for deb in "$DEBS"/*.deb; do dpkg-deb -x "$deb" "$TREE"; done
    touch "$TREE/complete"
fi
MODULES=$(echo "$TREE"/lib/modules/*/kernel)
[ -d "$MODULES" ] || fail "no kernel modules in $TREE; remove it and $DEBS and build again"
BUSYBOX=$TREE/bin/busybox; [ -f "$BUSYBOX" ] || BUSYBOX=$TREE/usr/bin/busybox

T=$WORK/tmp; rm -rf "$T"; mkdir -p "$T"
gcc -O2 -static -s -Wall -Wl,--build-id=none -o "$T/tinyd" tinyd.c
gcc -O2 -Wall -o "$T/payload" payload.c

# ---- initramfs: busybox, tinyd and the few modules of this virtual hardware, in load order ----
I=$T/initramfs
mkdir -p "$I"/{bin,dev,proc,sys,sysroot,data,seed,modules,tmp,run,etc/ssh,sbin,usr/bin,usr/sbin,usr/lib/collective}
cp "$BUSYBOX" "$I/bin/busybox"
ln -s busybox "$I/bin/sh"
for a in $("$BUSYBOX" --list | grep -x '[a-z0-9]*'); do [ -e "$I/bin/$a" ] || ln -s busybox "$I/bin/$a"; done
cp "$T/tinyd" init dhcp on-event "$I/"
cp "$GUEST/usr/lib/collective/instance" "$I/usr/lib/collective/"
chmod 755 "$I/init" "$I/dhcp" "$I/on-event" "$I/tinyd" "$I/bin/busybox" "$I/usr/lib/collective/instance"
# An identity of its own, which is every instance's until it takes up another.
echo tiny >"$I/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 tiny.test tiny\n' >"$I/etc/hosts"
echo 00000000000000000000000000000000 >"$I/etc/machine-id"
echo "every tiny's" | tee "$I/etc/ssh/ssh_host_ed25519_key" >"$I/etc/ssh/ssh_host_ed25519_key.pub"
for m in drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev \
         drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci drivers/block/virtio_blk \
         net/core/failover drivers/net/net_failover drivers/net/virtio_net drivers/char/hw_random/virtio-rng \
         drivers/virtio/virtio_balloon drivers/block/loop drivers/acpi/button drivers/input/evdev \
         fs/nls/nls_cp437 fs/nls/nls_ascii fs/fat/fat fs/fat/vfat; do
    cp "$MODULES/$m.ko" "$I/modules/" || fail "the kernel has no module $m; adapt the list in build.sh"
    basename "$m" >>"$I/modules/order"
done
cp "$MODULES/fs/efivarfs/efivarfs.ko" "$I/modules/" # loaded by init if there is UEFI
find "$I" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
(cd "$I" && find . -print0 | sort -z | cpio --null -o -H newc --reproducible --owner=0:0 --quiet) | gzip -n -1 >"$T/initrd"

# ---- system disk ----
# debugfs writes the files one after the other, in this order, so that neither the host's directory order nor its
# clock gets into the image; mke2fs -d would take both.
P=$T/part
echo "$VERSION" >"$T/version"
"$T/payload" base  0          2097152 0   >"$T/base"    # the same in all versions
"$T/payload" half  "$VERSION" 2097152 50  >"$T/half"    # half of its blocks differ
"$T/payload" few   "$VERSION" 1048576 5   >"$T/few"
"$T/payload" whole "$VERSION" 1048576 100 >"$T/whole"
truncate -s 61M "$P"
mke2fs -q -F -t ext4 -b 4096 -L tiny-system -U 7f1e7a00-0000-4000-8000-00000000000$((VERSION % 10)) -m 0 -J size=4 \
    -E hash_seed=7f1e7a00-0000-4000-8000-0000000000aa,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 "$P" >&2
kernel=$(echo "$TREE"/boot/vmlinuz-*)
put() { # FILE PATH MODE
    echo "write $1 $2"
    echo "sif $2 mode 0$3"; echo "sif $2 uid 0"; echo "sif $2 gid 0"
}
{
    echo "mkdir boot"
    put "$kernel" boot/vmlinuz 100644
    put "$T/initrd" boot/initrd 100644
    put "$T/version" version 100644
    echo "mkdir payload"
    for f in base half few whole; do put "$T/$f" payload/$f 100644; done
    for f in . lost+found boot boot/vmlinuz boot/initrd version payload payload/{base,half,few,whole}; do
        for t in atime ctime mtime crtime; do echo "sif $f $t @$SOURCE_DATE_EPOCH"; done
    done
} >"$T/debugfs"
debugfs -w -f "$T/debugfs" "$P" >"$T/debugfs.log" 2>&1
! grep -vE '^debugfs|^Allocated inode' "$T/debugfs.log" >&2 || fail "debugfs could not fill the system disk (see above)"

# The same GRUB twice: for BIOS in the gap before the first partition, for UEFI as the program that firmware looks for on
# an EFI system partition. No menu and no wait. For BIOS linux16 rather than linux: the latter moves the kernel's whole
# run-time size (54 MB) byte by byte, which takes 3 s under emulation; and sectors rather than files, which GRUB reads in
# small pieces that take another second.
sectors() { # FILE; as START+COUNT,...
    debugfs -R "blocks $1" "$P" 2>/dev/null | tr ' ' '\n' |
        awk '/./ { if ($1 != next_) { if (n) printf "%d+%d,", start * 8, n * 8; start = $1; n = 0 } n++; next_ = $1 + 1 }
             END { if (n) printf "%d+%d", start * 8, n * 8 }'
}
boot_loader() { # FORMAT OUTPUT SUFFIX KERNEL INITRD MODULE...
    cat >"$T/early.cfg" <<G
linux$3 $4 console=ttyS0 quiet nokaslr tsc=reliable no_timer_check mitigations=off cryptomgr.notests initcall_blacklist=crypto_kdf108_init,init_kprobe_trace,slab_sysfs_init
initrd$3 $5
boot
G
    grub-mkimage -O "$1" -c "$T/early.cfg" -p '(,msdos1)/boot/grub' -o "$2" part_msdos ext2 "linux$3" "${@:6}"
}
boot_loader i386-pc "$T/core.img" 16 "$(sectors /boot/vmlinuz)" "$(sectors /boot/initrd)" biosdisk
boot_loader x86_64-efi "$T/bootx64.efi" "" /boot/vmlinuz /boot/initrd
[ "$(stat -c %s "$T/core.img")" -le $((2047 * 512)) ] || fail "GRUB's core.img does not fit before the first partition"
D=$OUT/system.raw
truncate -s 64M "$D"
echo "label: dos
label-id: 0x7f1e7a0$((VERSION % 10))
start=2048, size=61MiB, type=83, bootable
size=2MiB, type=ef" | sfdisk -q "$D" >&2
dd if=$GRUB/i386-pc/boot.img of="$D" bs=440 count=1 conv=notrunc status=none
dd if="$T/core.img" of="$D" bs=512 seek=1 conv=notrunc status=none
dd if="$P" of="$D" bs=1M seek=1 conv=notrunc,sparse status=none
touch -d "@$SOURCE_DATE_EPOCH" "$T/bootx64.efi"
esp=$D@@62M
mformat -i "$esp" -T 4096 -h 2 -s 32 -N 7f1e7a00 ::
mmd -i "$esp" ::/EFI ::/EFI/BOOT
mcopy -m -i "$esp" "$T/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI

# ---- data disk: the template of the user's disk, the same in all versions ----
truncate -s 32M "$OUT/data.raw"
mke2fs -q -F -t ext4 -b 4096 -L tiny-data -U 7f1e7a00-0000-4000-8000-0000000000da -m 0 -J size=4 \
    -E hash_seed=7f1e7a00-0000-4000-8000-0000000000ab,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 "$OUT/data.raw" >&2
debugfs -w -R "sif . ctime @$SOURCE_DATE_EPOCH" "$OUT/data.raw" 2>/dev/null
rm -rf "$T"

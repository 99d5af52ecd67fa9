// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Debian guest's disk: an ext4 file system in a raw image, made from Debian packages.
//!
//! It holds nothing of this project, so it does not change when the project does: modules and agent come in
//! by the initramfs and are in /run/viridian.

use std::{fs, path::PathBuf};

use anyhow::Result;

use crate::{
    cache::{Cache, Key, Recipe},
    cmd,
    kernel::Kernel,
    root::{self, BuildRoot},
};

/// Label of the root file system.
pub const LABEL: &str = "viridian-root";

/// Size of the disk. The file is sparse.
const SIZE: &str = "4G";

const PACKAGES: &str = "systemd,systemd-sysv,udev,dbus,kmod,login,passwd,e2fsprogs,util-linux,util-linux-extra,\
    procps,iproute2,iputils-ping,ethtool,iperf3,fio,sg3-utils,lsscsi,evtest,chrony,hyperv-daemons,python3-minimal,\
    kexec-tools,less,vim-tiny,pciutils,fdisk,gdisk,parted";

/// Units that cost time at boot and serve nothing in this guest. On a software CPU each process that is not
/// started saves a tenth of a second.
const MASKED: &str = "getty@tty1.service serial-getty@ttyS1.service apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer man-db.timer dpkg-db-backup.timer logrotate.timer \
    systemd-tmpfiles-clean.timer systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-timesyncd.service systemd-hwdb-update.service systemd-journal-catalog-update.service \
    systemd-update-done.service systemd-pcrmachine.service systemd-pcrphase.service \
    systemd-pcrphase-sysinit.service systemd-machine-id-commit.service systemd-firstboot.service \
    systemd-battery-check.service systemd-pstore.service systemd-rfkill.service systemd-rfkill.socket \
    systemd-networkd-wait-online.service sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount \
    dev-mqueue.mount kexec.service kexec-load.service iperf3.service modprobe@configfs.service \
    modprobe@drm.service modprobe@fuse.service modprobe@efi_pstore.service modprobe@loop.service \
    modprobe@dm_mod.service sys-fs-fuse-connections.mount sys-kernel-config.mount kmod-static-nodes.service \
    systemd-tmpfiles-setup-dev-early.service systemd-tmpfiles-setup-dev.service systemd-sysusers.service \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount \
    systemd-random-seed.service systemd-udev-load-credentials.service systemd-journal-flush.service \
    systemd-modules-load.service systemd-remount-fs.service systemd-sysctl.service ldconfig.service";

/// Run in the new tree, in `$1`.
const CUSTOMIZE: &str = r#"cd "$1"
echo viridian > etc/hostname
printf '127.0.0.1 localhost viridian\n' > etc/hosts
: > etc/fstab
chroot . passwd --delete root
echo 5ab9e1a0c7f54d0f8a52b7a9a1d0c3e4 > etc/machine-id
for unit in $MASKED; do ln -sf /dev/null "etc/systemd/system/$unit"; done
mkdir -p etc/systemd/system/systemd-udev-trigger.service.d etc/systemd/journald.conf.d etc/systemd/system.conf.d
mkdir -p etc/systemd/system/multi-user.target.wants etc/systemd/system/getty.target.wants
# In place of the one that waits for udev: the console serves from the first moment that it can.
cat > etc/systemd/system/serial-getty@ttyS0.service <<'END'
[Unit]
Description=Login shell on the serial console
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target getty.target
[Service]
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 ttyS0 ${TERM}
Environment=TERM=xterm-256color
Restart=always
UtmpIdentifier=ttyS0
StandardInput=tty
StandardOutput=tty
TTYPath=/dev/ttyS0
TTYReset=yes
KillMode=process
IgnoreSIGPIPE=no
SendSIGHUP=yes
END
ln -sf ../serial-getty@ttyS0.service etc/systemd/system/getty.target.wants/
# What is not named here has nothing for udev to do in this guest.
cat > etc/systemd/system/systemd-udev-trigger.service.d/viridian.conf <<'END'
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=block --subsystem-match=net \
    --subsystem-match=input --subsystem-match=vmbus --subsystem-match=scsi --subsystem-match=scsi_generic \
    --subsystem-match=ptp --subsystem-match=rtc
END
cat > etc/systemd/journald.conf.d/viridian.conf <<'END'
[Journal]
Storage=volatile
END
cat > etc/systemd/system.conf.d/viridian.conf <<'END'
[Manager]
DefaultTimeoutStopSec=10s
LogLevel=warning
ShowStatus=no
END
cat > etc/systemd/system/viridian-agent.service <<'END'
[Unit]
Description=Commands for the host, over the second serial port
ConditionPathExists=/run/viridian/guest-agent
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
[Service]
ExecStart=/run/viridian/guest-agent /dev/ttyS1
Restart=always
KillMode=process
[Install]
WantedBy=multi-user.target
END
# Of the programs that make units at each boot only the one for fstab has something to do.
mkdir -p etc/systemd/system-generators
for generator in usr/lib/systemd/system-generators/*; do
    case $generator in
        */systemd-fstab-generator) ;;
        *) ln -sf /dev/null "etc/systemd/system-generators/${generator##*/}" ;;
    esac
done
ln -sf ../viridian-agent.service etc/systemd/system/multi-user.target.wants/
ln -sf /lib/systemd/system/multi-user.target etc/systemd/system/default.target
rm -f etc/systemd/system/multi-user.target.wants/chrony.service etc/systemd/system/chronyd.service
cat > etc/profile.d/viridian.sh <<'END'
# The size of the user's terminal, which a serial port does not tell.
if [ "$(tty)" = /dev/ttyS0 ]; then
    size=$(sed -n 's/.*viridian\.size=\([0-9]*\)x\([0-9]*\).*/rows \1 cols \2/p' /proc/cmdline)
    [ -z "$size" ] || stty $size
fi
END
: > etc/motd
# Nothing is out of date: see systemd-update-done.service(8).
touch etc/.updated var/.updated
"#;

/// Makes the disk.
///
/// # Errors
///
/// When a step fails.
pub fn ensure(cache: &Cache, root: &BuildRoot, kernel: &Kernel) -> Result<PathBuf> {
    let recipe = Recipe {
        name: "debian",
        title: "Debian guest disk",
        key: Key::new("debian 1")
            .add("kernel", kernel.key.as_bytes())
            .add("root", root.key.as_bytes())
            .add("packages", PACKAGES.as_bytes())
            .add("masked", MASKED.as_bytes())
            .add("size", SIZE.as_bytes())
            .add("customize", CUSTOMIZE.as_bytes()),
        expected_lines: 1100,
    };
    let path = cache.get(&recipe, |tmp, step| {
        let tree = tmp.join("tree");
        let suites = ["trixie", "trixie-updates"];
        let hooks = [CUSTOMIZE.replace("$MASKED", MASKED)];
        cmd::run_logged(
            &mut root::install(PACKAGES, &tree, &suites, &hooks),
            step,
        )?;
        // The kernel's modules, where an installed kernel has them, and room for modules of one's own.
        root.script(format!(
            "cd {work}; m=tree/usr/lib/modules/{release}; mkdir -p \"$m/updates\"\n\
             cp -a {extra}/. \"$m/\"; rm -f \"$m/vmlinuz\"\n\
             mkdir -p tree/boot\n\
             mke2fs -q -t ext4 -L {LABEL} -d tree -E lazy_itable_init=0,lazy_journal_init=0 root.img {SIZE}\n\
             rm -rf tree",
            work = root::WORK,
            release = root::quote(&kernel.release),
            extra = root::EXTRA,
        ))
        .read(&kernel.modules, root::EXTRA)
        .write(tmp, root::WORK)
        .run(step)?;
        // The image is shared by all guests; what they write goes elsewhere.
        let image = tmp.join("root.img");
        let mut permissions = fs::metadata(&image)?.permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&image, permissions)?;
        Ok(())
    })?;
    Ok(path.join("root.img"))
}

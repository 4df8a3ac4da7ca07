//! A file system in a loop device. Knows nothing of the server that uses it.

use std::fs::{File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::support::{PATIENCE, skipped};

/// About the minimum size for xfs.
pub(crate) const SMALL_BYTES: u64 = 320 << 20;

#[derive(Clone, Copy, Debug)]
pub(crate) enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    pub(crate) const ALL: [Self; 2] = [Self::Ext4, Self::Xfs];

    /// Returns the command that creates the file system.
    fn make(self) -> Command {
        let (program, flags): (_, &[&str]) = match self {
            // No blocks are reserved for root, which the server runs as here. The block size is that of a
            // larger file system.
            Self::Ext4 => ("mkfs.ext4", &["-q", "-m", "0", "-b", "4096"]),
            Self::Xfs => ("mkfs.xfs", &["-q"]),
        };
        let mut command = Command::new(program);
        command.args(flags);
        command
    }
}

/// A mounted file system, unmounted when dropped. Everything that uses it has to end before, so declare its
/// variable first.
pub(crate) struct Volume {
    image: NamedTempFile,
    mounted_at: PathBuf,
}

impl Volume {
    /// Creates a file system and mounts it at a new folder. If the test may not mount, reports that and
    /// returns `None`. However large it is, only written data takes space.
    pub(crate) fn mount(kind: FileSystem, bytes: u64, mounted_at: &Path) -> Option<Self> {
        if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
            skipped("only root may mount a file system");
            return None;
        }
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(bytes).unwrap();
        std::fs::create_dir(mounted_at).unwrap();
        let made = run(kind.make().arg(image.path()));
        if let Err(error) = made.and_then(|()| mount(image.path(), mounted_at)) {
            skipped(&format!("{kind:?} can't be mounted in a loop device: {error}"));
            return None;
        }
        // Created by mkfs.ext4. Without it, the folder is empty, as a new data folder is.
        let _ = std::fs::remove_dir(mounted_at.join("lost+found"));
        std::fs::set_permissions(mounted_at, Permissions::from_mode(0o700)).unwrap();
        Some(Self { image, mounted_at: mounted_at.to_owned() })
    }

    /// Prepares a power loss, so that it happens without delay later.
    pub(crate) fn switch(&self) -> Switch {
        // Without -f, the log of the file system is not flushed. The ioctl is from xfs, but ext4 has it too.
        let xfs_io = Command::new("xfs_io")
            .arg("-x")
            .arg(&self.mounted_at)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Switch { xfs_io }
    }

    /// Mounts the volume again after a power loss, as the next boot does.
    pub(crate) fn boot(&self) {
        run(Command::new("umount").arg(&self.mounted_at)).unwrap();
        // A process that just started in a mount namespace of its own, such as a browser, may still have the file
        // system. Mounting it now would bring back the one that lost its power.
        let unmounted = Instant::now();
        while self.is_attached() {
            assert!(unmounted.elapsed() < PATIENCE, "the file system stays in use");
            std::thread::sleep(Duration::from_millis(5));
        }
        mount(self.image.path(), &self.mounted_at).unwrap();
    }

    /// Returns whether the image is in a loop device.
    fn is_attached(&self) -> bool {
        let found = Command::new("losetup").arg("--associated").arg(self.image.path()).output();
        !found.unwrap().stdout.is_empty()
    }

    /// Uses up all space except `spare_bytes`, in addition to the space that is used already.
    pub(crate) fn fill(&self, spare_bytes: usize) {
        let spare = self.mounted_at.join("spare");
        std::fs::write(&spare, vec![b'x'; spare_bytes]).unwrap();
        File::open(&spare).unwrap().sync_all().unwrap();
        let mut filler = File::options().create(true).append(true).open(self.filler()).unwrap();
        // A file system finds some more space once all written data has been allocated.
        for size in [1 << 20, 1 << 12, 1 << 12] {
            let full = loop {
                if let Err(error) = filler.write_all(&vec![b'x'; size]) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
            filler.sync_all().unwrap();
        }
        std::fs::remove_file(spare).unwrap();
        self.sync();
    }

    /// Frees `bytes` of the space that [`Self::fill`] used up.
    pub(crate) fn free(&self, bytes: u64) {
        let filler = File::options().write(true).open(self.filler()).unwrap();
        filler.set_len(filler.metadata().unwrap().len() - bytes).unwrap();
        filler.sync_all().unwrap();
    }

    /// Frees all of that space.
    pub(crate) fn make_room(&self) {
        std::fs::remove_file(self.filler()).unwrap();
        self.sync();
    }

    fn filler(&self) -> PathBuf {
        self.mounted_at.join("filler")
    }

    /// After this, the space of removed files can be used.
    fn sync(&self) {
        File::open(&self.mounted_at).unwrap().sync_all().unwrap();
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // The loop device is removed with the mount.
        if let Err(error) = run(Command::new("umount").arg(&self.mounted_at)) {
            eprintln!("{} stays mounted: {error}", self.mounted_at.display());
        }
    }
}

/// The power switch of a [`Volume`].
pub(crate) struct Switch {
    xfs_io: Child,
}

impl Switch {
    /// Cuts the power: no data reaches the disk from now on.
    pub(crate) fn cut(mut self) {
        self.xfs_io.stdin.take().unwrap().write_all(b"shutdown\n").unwrap();
        assert!(self.xfs_io.wait().unwrap().success(), "xfs_io failed");
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // Both fail if the process has already ended. The volume can't be unmounted while it runs.
        let _ = self.xfs_io.kill();
        let _ = self.xfs_io.wait();
    }
}

/// Makes the kernel write memory-mapped files back every second instead of every half minute. Restores the
/// settings when dropped.
pub(crate) struct QuickWriteback {
    before: Vec<(&'static str, String)>,
}

impl QuickWriteback {
    /// The age at which data is written back, and how often the kernel checks for it.
    const SETTINGS: [(&str, &str); 2] = [
        ("/proc/sys/vm/dirty_expire_centisecs", "100"),
        ("/proc/sys/vm/dirty_writeback_centisecs", "50"),
    ];

    /// The caller has to be root.
    pub(crate) fn begin() -> Self {
        let mut writeback = Self { before: Vec::new() };
        for (setting, value) in Self::SETTINGS {
            writeback.before.push((setting, std::fs::read_to_string(setting).unwrap()));
            std::fs::write(setting, value).unwrap();
        }
        writeback
    }
}

impl Drop for QuickWriteback {
    fn drop(&mut self) {
        for (setting, value) in &self.before {
            if let Err(error) = std::fs::write(setting, value) {
                eprintln!("{setting} was {} and can't be restored: {error}", value.trim());
            }
        }
    }
}

fn mount(image: &Path, at: &Path) -> Result<(), String> {
    run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

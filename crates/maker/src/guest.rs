//! Files that a recipe may put into a guest with systemd, so that it knows the time and who it is when it goes on from a
//! saved state. They are part of the program: a maker has them wherever he builds.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Path below the guest's root, rights, content.
const FILES: [(&str, u32, &str); 3] = [
    ("usr/lib/collective/instance", 0o755, include_str!("../guest/usr/lib/collective/instance")),
    (
        "usr/lib/udev/rules.d/90-collective.rules",
        0o644,
        include_str!("../guest/usr/lib/udev/rules.d/90-collective.rules"),
    ),
    (
        "usr/lib/systemd/system/collective-instance@.service",
        0o644,
        include_str!("../guest/usr/lib/systemd/system/collective-instance@.service"),
    ),
];

/// Writes them below `folder`, and nothing else is there afterwards.
pub(crate) fn write_files(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for (name, mode, content) in FILES {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(folder))?;
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

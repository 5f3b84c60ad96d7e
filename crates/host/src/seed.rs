//! The seed disk: how settings and identity reach a guest without an agent.
//!
//! A small FAT volume labelled CIDATA, which cloud-init knows as its NoCloud source; everything else can read it as
//! files. It is made anew at every start, so the guest's identity does not depend on its system disk; a guest that goes
//! on is told that it has another one (`tell_of_content` in `vmm`).

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use collective_keys::SshKey;
use collective_model::{CloudInit, Manifest, Spec};

/// FAT needs some room; a sparse file takes only what is written.
const SIZE: u64 = 1 << 20;

/// A file of the seed disk.
type SeedFile = (&'static str, Vec<u8>);

/// Writes the seed disk of an instance to `path`.
pub fn write(path: &Path, spec: &Spec, manifest: &Manifest, ssh_host_key: &SshKey) -> io::Result<()> {
    let settings = manifest.settings_with(&spec.settings).map_err(io::Error::other)?;
    // The folder is that of QEMU's user, who may have put something else there.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut image = std::fs::File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    image.set_len(SIZE)?;
    let mut files = files(spec, &settings);
    let user_data = user_data(manifest.cloud_init.as_ref(), &spec.authorized_keys, ssh_host_key);
    files.push(("user-data", user_data.into_bytes()));
    files.push(("collective/ssh_host_ed25519_key", ssh_host_key.private.clone().into_bytes()));
    files.push(("collective/ssh_host_ed25519_key.pub", ssh_host_key.public.clone().into_bytes()));
    files.extend(this_time()?);
    fill(&mut image, &files)?;
    image.sync_all()
}

/// What is another at every start, and every time a machine goes on.
fn this_time() -> io::Result<[SeedFile; 2]> {
    let id = collective_keys::random_id().map_err(io::Error::other)?;
    let generation: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let random = collective_keys::random_secret().map_err(io::Error::other)?;
    Ok([
        ("collective/generation", format!("{generation}\n").into_bytes()),
        ("collective/random-seed", format!("{random}\n").into_bytes()),
    ])
}

fn files(spec: &Spec, settings: &BTreeMap<String, String>) -> Vec<SeedFile> {
    let shell = settings
        .iter()
        .map(|(key, value)| format!("SETTING_{}='{}'\n", key.to_uppercase(), value.replace('\'', r"'\''")));
    let keys: String = spec.authorized_keys.iter().map(|key| format!("{key}\n")).collect();
    let json = serde_json::to_vec(settings).unwrap_or_default();
    vec![
        ("meta-data", format!("instance-id: {}\nlocal-hostname: {}\n", spec.id, spec.name).into_bytes()),
        ("collective/settings.env", shell.collect::<String>().into_bytes()),
        ("collective/settings.json", json),
        ("collective/hostname", format!("{}\n", spec.name).into_bytes()),
        ("collective/machine-id", format!("{}\n", spec.id).into_bytes()),
        ("collective/authorized_keys", keys.into_bytes()),
    ]
}

/// cloud-init would make a host key of its own whenever it finds a new system disk, that is with every version.
fn user_data(cloud_init: Option<&CloudInit>, authorized_keys: &[String], host_key: &SshKey) -> String {
    let mut text = String::from("#cloud-config\n");
    if let Some(cloud_init) = cloud_init {
        // JSON strings are YAML strings.
        let quoted = |text: &str| serde_json::json!(text);
        text += &format!("ssh_keys:\n  ed25519_private: {}\n", quoted(&host_key.private));
        text += &format!("  ed25519_public: {}\n", quoted(&host_key.public));
        if !authorized_keys.is_empty() {
            text += "ssh_authorized_keys:\n";
            text.extend(authorized_keys.iter().map(|key| format!("  - {}\n", quoted(key))));
        }
        text += &cloud_init.user_data;
    }
    text
}

fn fill(image: &mut (impl Read + Write + Seek), files: &[SeedFile]) -> io::Result<()> {
    let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ").volume_id(0x0c1d_da7a);
    fatfs::format_volume(&mut *image, options)?;
    image.seek(SeekFrom::Start(0))?;
    let volume = fatfs::FileSystem::new(image, fatfs::FsOptions::new())?;
    {
        let root = volume.root_dir();
        for (name, content) in files {
            if let Some((folder, _)) = name.split_once('/') {
                root.create_dir(folder)?;
            }
            root.create_file(name)?.write_all(content)?;
        }
    }
    volume.unmount()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_is_for_cloud_init_only() {
        let host_key = SshKey { private: "BEGIN\nEND\n".into(), public: "ssh-ed25519 AAAA\n".into() };
        assert_eq!(user_data(None, &["key".into()], &host_key), "#cloud-config\n");
        let cloud_init = CloudInit { user_data: "locale: C.UTF-8\n".into() };
        let expected = r#"#cloud-config
ssh_keys:
  ed25519_private: "BEGIN\nEND\n"
  ed25519_public: "ssh-ed25519 AAAA\n"
ssh_authorized_keys:
  - "key \"of\" n"
locale: C.UTF-8
"#;
        assert_eq!(user_data(Some(&cloud_init), &[r#"key "of" n"#.into()], &host_key), expected);
    }

    #[test]
    fn files_come_back() {
        let mut image = io::Cursor::new(vec![0; SIZE as usize]);
        let long = vec![b'x'; 9000];
        fill(&mut image, &[("meta-data", b"a".to_vec()), ("collective/settings.json", long.clone())]).unwrap();
        image.set_position(0);
        let volume = fatfs::FileSystem::new(image, fatfs::FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label().trim(), "CIDATA");
        let mut found = Vec::new();
        volume.root_dir().open_file("collective/settings.json").unwrap().read_to_end(&mut found).unwrap();
        assert_eq!(found, long);
    }
}

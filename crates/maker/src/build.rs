//! `collective build`: runs a recipe's own script, once for each version, and checks what came out.
//!
//! The script is run in the recipe's folder with `VERSION`, `OUT` (an empty folder for the disk files), `WORK` (a folder
//! that stays between versions and runs), `GUEST` (files to put into the guest) and `SOURCE_DATE_EPOCH`. Lines on its
//! standard output that begin with `note: ` are for the user; everything on standard error is progress.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use collective_model::{Recipe, RecipeError, VersionName};

/// The same for every build, so that the same packages give the same bytes: 2026-01-01.
const EPOCH: &str = "1767225600";

/// One version, built.
#[derive(Clone, Debug)]
pub struct BuiltVersion {
    /// Its name.
    pub version: VersionName,
    /// Where its `appliance.toml` and disk files are.
    pub folder: PathBuf,
    /// What the script had to say.
    pub notes: Vec<String>,
}

/// Why a build fails.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The file system says no.
    #[error("cannot {attempt} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The `appliance.toml` is wrong.
    #[error("{} is wrong: {source}", path.display())]
    Recipe {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: RecipeError,
    },
    /// There is nothing to build.
    #[error("{} has no [build] section: its disk files are already what is published", .0.display())]
    NothingToBuild(PathBuf),
    /// The recipe does not know this version.
    #[error("the recipe builds no version \"{version}\"; it builds: {known}")]
    Version {
        /// Asked for.
        version: VersionName,
        /// Known.
        known: String,
    },
    /// The script failed.
    #[error("the recipe's script failed for version {version} ({status}): {last}")]
    Script {
        /// Which version.
        version: VersionName,
        /// How.
        status: String,
        /// Its last words.
        last: String,
    },
    /// A disk file is not there.
    #[error("the recipe's script did not make {}", .0.display())]
    Missing(PathBuf),
}

fn io(attempt: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { attempt, path, source }
}

/// Reads the `appliance.toml` of a folder.
pub fn read_recipe(folder: &Path) -> Result<Recipe, BuildError> {
    let path = folder.join("appliance.toml");
    let text = std::fs::read_to_string(&path).map_err(io("read", &path))?;
    Recipe::parse(&text).map_err(|source| BuildError::Recipe { path, source })
}

/// Builds `only` or all versions of the recipe in `folder`, into `FOLDER/build/VERSION`. Tells `progress` every line.
pub fn build(
    folder: &Path,
    only: &[VersionName],
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<BuiltVersion>, BuildError> {
    let recipe = read_recipe(folder)?;
    let Some(plan) = &recipe.build else { return Err(BuildError::NothingToBuild(folder.join("appliance.toml"))) };
    if let Some(version) = only.iter().find(|version| !plan.versions.contains(version)) {
        let known: Vec<_> = plan.versions.iter().map(VersionName::as_str).collect();
        return Err(BuildError::Version { version: version.clone(), known: known.join(", ") });
    }
    let folder = folder.canonicalize().map_err(io("enter", folder))?;
    // No version can have this name.
    let work = folder.join("build/.work");
    std::fs::create_dir_all(&work).map_err(io("create", &work))?;
    let guest = folder.join("build/.guest");
    crate::guest::write_files(&guest).map_err(io("write into", &guest))?;
    let wanted = plan.versions.iter().filter(|version| only.is_empty() || only.contains(version));
    let mut built = Vec::new();
    for version in wanted {
        progress(&format!("building {} version {version}", recipe.appliance()));
        let out = folder.join("build").join(version.as_str());
        // Built beside its place, so that an interrupted build leaves nothing that looks finished.
        let part = folder.join("build").join(format!(".{version}.part"));
        for old in [&part, &out] {
            match std::fs::remove_dir_all(old) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io("clear", old)(error)),
                _ => {}
            }
        }
        std::fs::create_dir_all(&part).map_err(io("create", &part))?;
        let notes = run_script(&folder.join(&plan.script), &folder, version, [&part, &work, &guest], progress)?;
        for file in recipe.disks.iter().filter_map(|disk| disk.file.as_ref()) {
            if !part.join(file).is_file() {
                return Err(BuildError::Missing(part.join(file)));
            }
        }
        let resolved = Recipe { version: Some(version.clone()), build: None, ..recipe.clone() };
        let text = toml::to_string(&resolved).map_err(|e| io("write", &part)(std::io::Error::other(e)))?;
        std::fs::write(part.join("appliance.toml"), text).map_err(io("write into", &part))?;
        std::fs::rename(&part, &out).map_err(io("finish", &out))?;
        built.push(BuiltVersion { version: version.clone(), folder: out, notes });
    }
    Ok(built)
}

fn run_script(
    script: &Path,
    folder: &Path,
    version: &VersionName,
    [out, work, guest]: [&Path; 3],
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<String>, BuildError> {
    let mut child = Command::new(script)
        .current_dir(folder)
        .env("VERSION", version.as_str())
        .env("OUT", out)
        .env("WORK", work)
        .env("GUEST", guest)
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(io("run", script))?;
    let stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let lines = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines().map_while(Result::ok));
        lines.filter_map(|line| line.strip_prefix("note: ").map(str::to_owned)).collect::<Vec<_>>()
    });
    let mut last: Vec<String> = Vec::new();
    for line in child.stderr.take().into_iter().flat_map(|err| BufReader::new(err).split(b'\n').map_while(Result::ok)) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        progress(&line);
        last.push(line);
        if last.len() > 5 {
            last.remove(0);
        }
    }
    let status = child.wait().map_err(io("wait for", script))?;
    let notes = reader.join().unwrap_or_default();
    if status.success() {
        Ok(notes)
    } else {
        Err(BuildError::Script { version: version.clone(), status: status.to_string(), last: last.join(" | ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn recipe(script: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let toml = "publisher='t'\nname='t'\n[[disk]]\nname='system'\nrole='system'\nfile='system.raw'\n\
                    [build]\nscript='build.sh'\nversions=['1','2']\n";
        std::fs::write(folder.path().join("appliance.toml"), toml).unwrap();
        let path = folder.path().join("build.sh");
        std::fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }

    #[test]
    fn a_recipe_is_built() {
        let folder = recipe(
            "echo working >&2; echo 'note: hello'; echo $VERSION > $OUT/system.raw; \
             cd $GUEST && test -x usr/lib/collective/instance && test -s usr/lib/udev/rules.d/90-collective.rules\n",
        );
        let mut lines = Vec::new();
        let built = build(folder.path(), &[], &mut |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(built.len(), 2);
        assert_eq!(built[1].notes, ["hello"]);
        assert_eq!(std::fs::read_to_string(built[1].folder.join("system.raw")).unwrap(), "2\n");
        assert_eq!(read_recipe(&built[1].folder).unwrap().version.unwrap().as_str(), "2");
        assert!(lines.contains(&"working".to_owned()));
    }

    #[test]
    fn failures_say_why_and_leave_nothing() {
        let folder = recipe("echo 'no space' >&2; exit 3\n");
        let error = build(folder.path(), &[], &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("no space") && error.contains("version 1"), "{error}");
        assert!(!folder.path().join("build/1").exists());
        let folder = recipe("exit 0\n");
        let error = build(folder.path(), &[], &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("system.raw"), "{error}");
        let error = build(folder.path(), &["9".parse().unwrap()], &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("1, 2"), "{error}");
    }
}

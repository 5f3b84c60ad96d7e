//! Which plane a command talks to, and where things lie on this machine.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use collective_api::{Client, Endpoint, Token};
use serde::Deserialize;

/// Options of every command.
#[derive(Debug, Default, clap::Args)]
pub struct Connect {
    /// The plane: unix:PATH, or host:port together with a token [default: the local socket]
    #[arg(long, global = true, env = "COLLECTIVE_URL", value_name = "URL")]
    url: Option<String>,
    /// A user's token, from `collective token create`
    #[arg(long, global = true, env = "COLLECTIVE_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    token: Option<String>,
}

/// `config.toml` in the configuration folder.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    url: Option<String>,
    token: Option<String>,
}

impl Connect {
    /// Lets another program, and ours below it, talk to the same plane; a token never stands on a command line.
    pub fn pass_on(&self, command: &mut std::process::Command) {
        let given = [("COLLECTIVE_URL", &self.url), ("COLLECTIVE_TOKEN", &self.token)];
        command.envs(given.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))));
    }

    /// A client for the chosen plane: options and environment first, then the config file, then the local socket.
    pub fn client(&self) -> Result<Client> {
        let file = config_file()?;
        let url = self.url.clone().or(file.url);
        if let Some(path) = url.as_deref().and_then(|url| url.strip_prefix("unix:")) {
            return Ok(Client::new(Endpoint::Unix(path.into()), None));
        }
        if let Some(token) = self.token.clone().or(file.token) {
            let mut token: Token = token.parse()?;
            if let Some(address) = url {
                token.address = address.trim_start_matches("https://").to_owned();
            }
            return Ok(Client::new(token.endpoint(), Some(token.secret)));
        }
        if let Some(url) = url {
            bail!("{url} is on another machine, and that needs a token: set COLLECTIVE_TOKEN, or use unix:PATH");
        }
        Ok(Client::new(Endpoint::Unix(socket(&default_data())), None))
    }
}

fn config_file() -> Result<ConfigFile> {
    let path = config_dir().join("config.toml");
    match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).with_context(|| format!("{} is wrong", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(ConfigFile::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn home() -> PathBuf {
    std::env::var_os("HOME").map_or_else(|| "/".into(), PathBuf::from)
}

fn folder(variable: &str, xdg: &str, below_home: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let base = std::env::var_os(xdg).map_or_else(|| home().join(below_home), PathBuf::from);
    base.join("collective")
}

/// Keys and `config.toml`.
pub fn config_dir() -> PathBuf {
    folder("COLLECTIVE_CONFIG", "XDG_CONFIG_HOME", ".config")
}

/// Units of an ordinary user.
pub fn systemd_user_dir() -> PathBuf {
    std::env::var_os("XDG_CONFIG_HOME").map_or_else(|| home().join(".config"), PathBuf::from).join("systemd/user")
}

/// What can be made anew.
pub fn cache_dir() -> PathBuf {
    folder("COLLECTIVE_CACHE", "XDG_CACHE_HOME", ".cache")
}

/// Where `up` keeps everything unless told otherwise.
pub fn default_data() -> PathBuf {
    if std::env::var_os("COLLECTIVE_DATA").is_none() && rustix::process::geteuid().is_root() {
        return "/var/lib/collective".into();
    }
    folder("COLLECTIVE_DATA", "XDG_DATA_HOME", ".local/share")
}

/// The local socket of the plane in `data`.
pub fn socket(data: &std::path::Path) -> PathBuf {
    data.join("plane.sock")
}

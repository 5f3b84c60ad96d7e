//! How to tell from outside whether an instance does its job.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Span;

/// A probe from outside the guest; nothing in the guest needs to know of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// Healthy when this request is answered as expected.
    pub http: HttpProbe,
    /// Pause between two probes.
    #[serde(default = "default_interval")]
    pub interval: Span,
    /// How long one probe may take.
    #[serde(default = "default_timeout")]
    pub timeout: Span,
    /// How long after its start an instance may take to become healthy; an update that does not make it goes back.
    #[serde(default = "default_limit")]
    pub limit: Span,
}

fn default_interval() -> Span {
    Span(Duration::from_secs(1))
}

fn default_timeout() -> Span {
    Span(Duration::from_secs(5))
}

fn default_limit() -> Span {
    Span(Duration::from_secs(180))
}

/// An HTTP GET to a port of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpProbe {
    /// The guest's TCP port.
    pub port: u16,
    /// Path and query, beginning with `/`.
    pub path: String,
    /// The status that means healthy.
    #[serde(default = "default_status")]
    pub status: u16,
}

fn default_status() -> u16 {
    200
}

/// What the last probes said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthState {
    /// Not running, or the version declares no health check.
    #[default]
    Unknown,
    /// Started, not yet healthy, and still within the limit.
    Waiting,
    /// The last probe was answered as expected.
    Healthy,
    /// It was healthy and is not, or its limit has passed.
    Unhealthy,
}

impl std::fmt::Display for HealthState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::Waiting => "waiting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        })
    }
}

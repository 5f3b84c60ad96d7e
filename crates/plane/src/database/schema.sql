-- The plane's records. Times are milliseconds since 1970, UTC; documents are the JSON of the API.

CREATE TABLE IF NOT EXISTS publishers (
    name    TEXT PRIMARY KEY,
    key     TEXT NOT NULL,
    changes TEXT NOT NULL DEFAULT '[]'
) STRICT;

CREATE TABLE IF NOT EXISTS versions (
    digest    TEXT PRIMARY KEY,
    publisher TEXT NOT NULL REFERENCES publishers(name),
    appliance TEXT NOT NULL,
    version   TEXT NOT NULL,
    created   INTEGER NOT NULL,
    summary   TEXT NOT NULL,
    manifest  TEXT NOT NULL,
    packs     TEXT NOT NULL,
    UNIQUE (publisher, appliance, version)
) STRICT;

CREATE TABLE IF NOT EXISTS channels (
    publisher TEXT NOT NULL,
    appliance TEXT NOT NULL,
    channel   TEXT NOT NULL,
    serial    INTEGER NOT NULL,
    version   TEXT NOT NULL REFERENCES versions(digest),
    pointer   TEXT NOT NULL,
    PRIMARY KEY (publisher, appliance, channel)
) STRICT;

-- Only hashes of secrets are kept.
CREATE TABLE IF NOT EXISTS tokens (
    hash    TEXT PRIMARY KEY,
    kind    TEXT NOT NULL,
    created INTEGER NOT NULL
) STRICT;

CREATE TABLE IF NOT EXISTS hosts (
    name        TEXT PRIMARY KEY,
    secret_hash TEXT NOT NULL UNIQUE,
    facts       TEXT,
    seen        INTEGER
) STRICT;

CREATE TABLE IF NOT EXISTS instances (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    host       TEXT NOT NULL REFERENCES hosts(name),
    generation INTEGER NOT NULL,
    spec       TEXT NOT NULL,
    follow     TEXT,
    hold_until INTEGER,
    observed   TEXT,
    failed     TEXT NOT NULL DEFAULT '[]'
) STRICT;

CREATE TABLE IF NOT EXISTS operations (
    id        TEXT PRIMARY KEY,
    instance  TEXT NOT NULL,
    operation TEXT NOT NULL,
    state     TEXT NOT NULL,
    final     INTEGER NOT NULL,
    created   INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS operations_open ON operations(final, created);

CREATE TABLE IF NOT EXISTS events (
    instance TEXT NOT NULL REFERENCES instances(id),
    serial   INTEGER NOT NULL,
    at       INTEGER NOT NULL,
    what     TEXT NOT NULL,
    message  TEXT NOT NULL,
    PRIMARY KEY (instance, serial)
) STRICT;

-- Publishers at work: what no version refers to is not removed before those end that began earlier.
CREATE TABLE IF NOT EXISTS leases (
    id        TEXT PRIMARY KEY,
    publisher TEXT NOT NULL,
    appliance TEXT NOT NULL,
    begun     INTEGER NOT NULL,
    expires   INTEGER NOT NULL
) STRICT;

-- Packs that no version refers to, since when that is known, and whether they are being removed.
CREATE TABLE IF NOT EXISTS condemned (
    publisher TEXT NOT NULL,
    appliance TEXT NOT NULL,
    pack      TEXT NOT NULL,
    since     INTEGER NOT NULL,
    removing  INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (publisher, appliance, pack)
) STRICT;

-- Versions that were withdrawn: their names never get other content.
CREATE TABLE IF NOT EXISTS withdrawn (
    publisher TEXT NOT NULL,
    appliance TEXT NOT NULL,
    version   TEXT NOT NULL,
    digest    TEXT NOT NULL,
    PRIMARY KEY (publisher, appliance, version)
) STRICT;

-- What the plane remembers of itself: its own id, and where its store is.
CREATE TABLE IF NOT EXISTS facts (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- Backups of private data. What is in them is encrypted; the names of their root pages are here only, so that a store cannot
-- give an old state in place of a new one. They outlive their instances.
CREATE TABLE IF NOT EXISTS backups (
    id       TEXT PRIMARY KEY,
    instance TEXT NOT NULL,
    taken    INTEGER NOT NULL,
    backup   TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS backups_of ON backups(instance, taken);

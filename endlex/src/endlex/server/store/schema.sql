-- The tables of an Endlex server, version 5. `database.py` runs this on every database of an earlier
-- version, after the changes to tables that were there (`UPGRADES`).

CREATE TABLE IF NOT EXISTS run (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, project TEXT NOT NULL,
    name TEXT NOT NULL, group_name TEXT, notes TEXT, tags TEXT NOT NULL DEFAULT '[]', host TEXT,
    status TEXT NOT NULL DEFAULT 'running', created REAL NOT NULL, updated REAL NOT NULL,
    archived INTEGER NOT NULL DEFAULT 0, deleted REAL, color TEXT
);
CREATE INDEX IF NOT EXISTS run_by_project ON run (project);
CREATE TABLE IF NOT EXISTS session (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL REFERENCES run (pk),
    id TEXT NOT NULL, kind TEXT NOT NULL, rank INTEGER NOT NULL DEFAULT 0, host TEXT, pid INTEGER,
    config TEXT NOT NULL DEFAULT '{}', started REAL NOT NULL, last_seen REAL NOT NULL,
    status TEXT NOT NULL DEFAULT 'running', offset INTEGER NOT NULL DEFAULT 0,
    damaged_lines INTEGER NOT NULL DEFAULT 0, unsent_bytes INTEGER, heard REAL,
    UNIQUE (run, id)
);
CREATE TABLE IF NOT EXISTS segment (
    session INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (session, start)
);
CREATE TABLE IF NOT EXISTS metric (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL REFERENCES run (pk),
    name TEXT NOT NULL, count INTEGER NOT NULL DEFAULT 0, last REAL, last_text TEXT,
    last_step INTEGER, min REAL, max REAL, UNIQUE (run, name)
);
CREATE TABLE IF NOT EXISTS series (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, metric INTEGER NOT NULL, session INTEGER NOT NULL,
    chunks INTEGER NOT NULL DEFAULT 0, tail INTEGER NOT NULL DEFAULT 0,
    count INTEGER NOT NULL DEFAULT 0, UNIQUE (metric, session)
);
CREATE TABLE IF NOT EXISTS chunk (
    pk INTEGER PRIMARY KEY, count INTEGER NOT NULL, min_step INTEGER NOT NULL,
    max_step INTEGER NOT NULL, steps BLOB NOT NULL, numbers BLOB NOT NULL, times BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS peak (
    pk INTEGER PRIMARY KEY, count INTEGER NOT NULL, first_step INTEGER NOT NULL,
    last_step INTEGER NOT NULL, first_time REAL NOT NULL, last_time REAL NOT NULL,
    ordered INTEGER NOT NULL, content BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS text (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, text TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS text_by_name ON text (run, name, step);
CREATE TABLE IF NOT EXISTS data_table (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, content TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS table_by_name ON data_table (run, name, step);
CREATE TABLE IF NOT EXISTS checkpoint (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    created REAL NOT NULL, state TEXT NOT NULL, error TEXT, bytes INTEGER NOT NULL,
    aliases TEXT NOT NULL, metadata TEXT NOT NULL, manifest TEXT, removed REAL, reason TEXT,
    UNIQUE (run, name)
);
CREATE TABLE IF NOT EXISTS checkpoint_part (
    checkpoint INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (checkpoint, sha256)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS checkpoint_by_part ON checkpoint_part (sha256);
CREATE TABLE IF NOT EXISTS alert (
    pk INTEGER PRIMARY KEY, run INTEGER, kind TEXT NOT NULL, metric TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL, opened REAL NOT NULL, resolved REAL, dismissed REAL,
    sent INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS alert_by_run ON alert (run, kind, metric);
CREATE TABLE IF NOT EXISTS token (
    pk INTEGER PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL,
    created REAL NOT NULL, last_used REAL, revoked REAL, runs_before INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS token_run (
    token INTEGER NOT NULL, run TEXT NOT NULL, PRIMARY KEY (run, token)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS login (
    hash TEXT PRIMARY KEY, token INTEGER NOT NULL, created REAL NOT NULL, expires REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS run_config (
    run INTEGER NOT NULL, key TEXT NOT NULL, number REAL, text TEXT NOT NULL, PRIMARY KEY (run, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS setting (
    project TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, content TEXT NOT NULL,
    changed REAL NOT NULL, PRIMARY KEY (project, kind, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS media (
    pk INTEGER PRIMARY KEY, run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
    time REAL NOT NULL, content TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS media_by_name ON media (run, name, step);
CREATE TABLE IF NOT EXISTS media_part (
    sha256 TEXT NOT NULL, run INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (sha256, run)
) WITHOUT ROWID;

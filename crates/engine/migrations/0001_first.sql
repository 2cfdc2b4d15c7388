-- What a worker knows of its own files and machines. The store is the authority for checkpoints;
-- rows here say which parts of them lie on this worker.

CREATE TABLE layers (
    id            TEXT PRIMARY KEY,
    format        TEXT NOT NULL,              -- raw | qcow2
    parent        TEXT REFERENCES layers (id),
    virtual_bytes BIGINT NOT NULL,
    frozen        BOOLEAN NOT NULL,           -- a frozen layer is never written again
    content       TEXT,                       -- JSON TreeRef of what a guest sees through this layer, once known
    stamp         TEXT,                       -- identity and times of the file when its content was last known to be right
    created       TEXT NOT NULL
);

CREATE TABLE templates (
    id       TEXT PRIMARY KEY,                -- manifest id, 64 hex digits
    name     TEXT NOT NULL UNIQUE,
    layer    TEXT NOT NULL REFERENCES layers (id),
    kernel   TEXT NOT NULL,                   -- blob name
    initrd   TEXT NOT NULL,
    cmdline  TEXT NOT NULL,
    detail   TEXT NOT NULL,                   -- JSON: suite, packages, sizes
    created  TEXT NOT NULL
);

CREATE TABLE sandboxes (
    id            TEXT PRIMARY KEY,
    name          TEXT NOT NULL UNIQUE,
    state         TEXT NOT NULL,              -- creating | running | stopped | hibernated | failed
    template      TEXT NOT NULL,              -- template id; the template may be gone
    machine       TEXT NOT NULL,              -- JSON Machine without disks' files
    vm_user       BIGINT NOT NULL,            -- user id that its QEMU runs as when started as root
    epoch         TEXT,                       -- 32 hex digits, the epoch the agent acknowledged
    launch        TEXT,                       -- id of its current or last run folder
    process       TEXT,                       -- PID@TICKS of its QEMU
    ram_sharing   TEXT,                       -- shared | private
    checkpoint    TEXT,                       -- manifest id it last came from or made: parent of the next one
    hibernated_as TEXT,                       -- manifest id to wake from
    created       TEXT NOT NULL
);

CREATE TABLE sandbox_disks (
    sandbox TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    slot    BIGINT NOT NULL,
    disk    TEXT NOT NULL,                    -- vda, vdb, …
    layer   TEXT NOT NULL REFERENCES layers (id),
    PRIMARY KEY (sandbox, slot)
);

-- Local parts of checkpoints: layers and RAM images that save a fetch.
CREATE TABLE local_checkpoints (
    manifest TEXT PRIMARY KEY,
    ram      TEXT                             -- file name under ram/
);

CREATE TABLE local_checkpoint_disks (
    manifest TEXT NOT NULL REFERENCES local_checkpoints (manifest) ON DELETE CASCADE,
    slot     BIGINT NOT NULL,
    layer    TEXT NOT NULL REFERENCES layers (id),
    PRIMARY KEY (manifest, slot)
);

CREATE TABLE jobs (
    id      TEXT PRIMARY KEY,
    kind    TEXT NOT NULL,
    sandbox TEXT,
    step    TEXT NOT NULL,                    -- the last step begun
    detail  TEXT NOT NULL,                    -- JSON: what recovery needs to undo it
    owner   TEXT NOT NULL,                    -- PID@TICKS
    created TEXT NOT NULL
);

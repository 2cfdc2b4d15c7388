-- In which epoch a command with a key of its own was first asked for: an agent that has never lived it cannot
-- know whether the command has run.
CREATE TABLE command_keys (
    sandbox TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    key     TEXT NOT NULL,                    -- 32 hex digits
    epoch   TEXT NOT NULL,                    -- 32 hex digits
    PRIMARY KEY (sandbox, key)
);

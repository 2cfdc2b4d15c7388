//! The worker's database: what lies on this worker and which operations are under way.
//!
//! SQLite in WAL mode; a transaction is durable when it commits (`synchronous = FULL`). Every
//! statement is here, so that what a crash can leave has one place to look.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{FromRow, SqliteConnection, SqlitePool};
use stead_store::TreeRef;
use stead_sys::process::ProcessId;

use crate::error::{EngineError, Kind, Result};

/// How long a statement waits for another process's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);

/// What state a sandbox is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxState {
    /// Its first start is under way.
    Creating,
    /// Its QEMU runs.
    Running,
    /// It has disks and no memory state.
    Stopped,
    /// Its whole state is in the store; nothing runs.
    Hibernated,
    /// Its QEMU ended without being asked to; the disks are as the guest left them.
    Crashed,
}

impl SandboxState {
    /// The word in the database and in output.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Hibernated => "hibernated",
            Self::Crashed => "crashed",
        }
    }

    fn parse(word: &str) -> Result<Self> {
        [
            Self::Creating,
            Self::Running,
            Self::Stopped,
            Self::Hibernated,
            Self::Crashed,
        ]
        .into_iter()
        .find(|state| state.word() == word)
        .ok_or_else(|| unreadable("sandbox state", word))
    }
}

/// How a sandbox's QEMU maps its RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RamSharing {
    /// A file of its own, mapped shared: the file is the RAM.
    Shared,
    /// A frozen image, mapped privately: forks share what they do not change.
    Private,
}

impl RamSharing {
    fn word(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
        }
    }

    fn parse(word: &str) -> Result<Self> {
        match word {
            "shared" => Ok(Self::Shared),
            "private" => Ok(Self::Private),
            other => Err(unreadable("RAM sharing", other)),
        }
    }
}

/// A sandbox as the worker knows it.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub id: String,
    pub name: String,
    pub state: SandboxState,
    pub template: String,
    pub machine: String,
    pub vm_user: u32,
    pub epoch: Option<String>,
    pub launch: Option<String>,
    pub process: Option<ProcessId>,
    pub ram_sharing: Option<RamSharing>,
    pub checkpoint: Option<String>,
    pub hibernated_as: Option<String>,
    pub created: String,
}

#[derive(FromRow)]
struct SandboxRow {
    id: String,
    name: String,
    state: String,
    template: String,
    machine: String,
    vm_user: i64,
    epoch: Option<String>,
    launch: Option<String>,
    process: Option<String>,
    ram_sharing: Option<String>,
    checkpoint: Option<String>,
    hibernated_as: Option<String>,
    created: String,
}

impl TryFrom<SandboxRow> for Sandbox {
    type Error = EngineError;

    fn try_from(row: SandboxRow) -> Result<Self> {
        Ok(Self {
            state: SandboxState::parse(&row.state)?,
            vm_user: u32::try_from(row.vm_user).map_err(|source| {
                unreadable("user id", &row.vm_user.to_string()).because(source)
            })?,
            process: row.process.as_deref().map(parse_process).transpose()?,
            ram_sharing: row
                .ram_sharing
                .as_deref()
                .map(RamSharing::parse)
                .transpose()?,
            id: row.id,
            name: row.name,
            template: row.template,
            machine: row.machine,
            epoch: row.epoch,
            launch: row.launch,
            checkpoint: row.checkpoint,
            hibernated_as: row.hibernated_as,
            created: row.created,
        })
    }
}

/// One disk of a sandbox and the layer the guest writes to.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct SandboxDisk {
    pub disk: String,
    pub layer: String,
}

/// A layer file.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct LayerRow {
    pub id: String,
    pub format: String,
    pub parent: Option<String>,
    pub virtual_bytes: i64,
    pub frozen: bool,
    pub content: Option<String>,
    /// What [`crate::layers::stamp`] said when the content was last known to be right.
    pub stamp: Option<String>,
}

/// A template of this worker.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct TemplateRow {
    pub id: String,
    pub name: String,
    pub layer: String,
    pub kernel: String,
    pub initrd: String,
    pub cmdline: String,
    pub detail: String,
    pub created: String,
}

/// An operation under way, or one whose process died.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct JobRow {
    pub id: String,
    pub kind: String,
    pub sandbox: Option<String>,
    pub step: String,
    pub detail: String,
    pub owner: String,
}

/// What a running sandbox's QEMU is.
#[derive(Debug, Clone)]
pub(crate) struct Incarnation<'a> {
    pub launch: &'a str,
    pub process: ProcessId,
    pub ram_sharing: RamSharing,
    pub epoch: Option<&'a str>,
}

/// Everything that uses layers, as it is at one moment.
#[derive(Debug)]
pub(crate) struct LayerUses {
    pub layers: Vec<LayerRow>,
    /// Sandboxes and the layers that their disks write to.
    pub disks: Vec<(String, String)>,
    /// Layers of templates and of local checkpoints.
    pub named: HashSet<String>,
    pub jobs: Vec<JobRow>,
}

impl LayerUses {
    /// A layer and everything below it, top first; at most [`crate::layers::DEPTH_MAX`].
    pub(crate) fn chain(&self, top: &str) -> Vec<LayerRow> {
        let mut next = Some(top);
        let mut chain = Vec::new();
        while let Some(id) = next.filter(|_| chain.len() < crate::layers::DEPTH_MAX) {
            let found = self.layers.iter().find(|layer| layer.id == id);
            chain.extend(found.cloned());
            next = found.and_then(|layer| layer.parent.as_deref());
        }
        chain
    }

    /// All layers that other sandboxes see.
    pub(crate) fn of_others(&self, sandbox: &str) -> HashSet<String> {
        let others = self.disks.iter().filter(|(own, _)| own != sandbox);
        let seen = others.flat_map(|(_, layer)| self.chain(layer));
        seen.map(|layer| layer.id).collect()
    }

    /// Whether a template or checkpoint is it.
    pub(crate) fn is_named(&self, layer: &str) -> bool {
        self.named.contains(layer)
    }

    /// How many layers stand directly on it.
    pub(crate) fn children(&self, layer: &str) -> usize {
        let is_child = |other: &&LayerRow| other.parent.as_deref() == Some(layer);
        self.layers.iter().filter(is_child).count()
    }
}

/// The database.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    pool: SqlitePool,
}

impl Records {
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let failed = |source: sqlx::Error| {
            EngineError::new(
                Kind::Internal,
                format!("open the worker's database {}", path.display()),
                "",
            )
            .because(source)
            .next("check that the data directory is writable; a damaged database can be moved away: checkpoints stay in the store")
        };
        // SQLite gives its side files the permissions of the database: nobody else reads epochs.
        match stead_sys::durable::create_scratch(path, 0o600) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(crate::paths::unusable("create", path, error)),
        }
        // SQLite does not say why it cannot open a file.
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| crate::paths::unusable("open", path, source))?;
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options)
            .await
            .map_err(failed)?;
        sqlx::migrate!("./migrations")
            .run(&pool)
            .await
            .map_err(|source| failed(source.into()))?;
        Ok(Self { pool })
    }

    /// Begins a transaction that takes the write lock at once, so that it cannot fail half-way for a reader's sake.
    pub(crate) async fn begin(&self) -> Result<sqlx::Transaction<'static, sqlx::Sqlite>> {
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }

    // ---- sandboxes

    pub(crate) async fn sandboxes(&self) -> Result<Vec<Sandbox>> {
        let rows: Vec<SandboxRow> = sqlx::query_as("SELECT * FROM sandboxes ORDER BY created, id")
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }

    /// Finds by name, by id, or by an id's unique beginning.
    pub(crate) async fn sandbox(&self, name: &str) -> Result<Sandbox> {
        let all = self.sandboxes().await?;
        if let Some(exact) = all.iter().find(|s| s.name == name || s.id == name) {
            return Ok(exact.clone());
        }
        let mut like = all
            .iter()
            .filter(|s| !name.is_empty() && s.id.starts_with(name));
        match (like.next(), like.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => Err(EngineError::usage(
                format!("find sandbox {name}"),
                "several ids begin like this",
            )
            .next("give more digits")),
            (None, _) => Err(EngineError::not_found("sandbox", name, "`stead ls`")),
        }
    }

    pub(crate) async fn insert_sandbox(
        tx: &mut SqliteConnection,
        sandbox: &Sandbox,
        disks: &[SandboxDisk],
    ) -> Result<()> {
        sqlx::query(
            "INSERT INTO sandboxes (id, name, state, template, machine, vm_user, checkpoint, created)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&sandbox.id)
        .bind(&sandbox.name)
        .bind(sandbox.state.word())
        .bind(&sandbox.template)
        .bind(&sandbox.machine)
        .bind(i64::from(sandbox.vm_user))
        .bind(&sandbox.checkpoint)
        .bind(&sandbox.created)
        .execute(&mut *tx)
        .await
        .map_err(|source| name_taken(source, "sandbox", &sandbox.name))?;
        Self::set_disks(tx, &sandbox.id, disks).await
    }

    /// Replaces the layers that a sandbox writes to.
    pub(crate) async fn set_disks(
        tx: &mut SqliteConnection,
        sandbox: &str,
        disks: &[SandboxDisk],
    ) -> Result<()> {
        sqlx::query("DELETE FROM sandbox_disks WHERE sandbox = ?")
            .bind(sandbox)
            .execute(&mut *tx)
            .await?;
        for (slot, disk) in (0_i64..).zip(disks) {
            sqlx::query(
                "INSERT INTO sandbox_disks (sandbox, slot, disk, layer) VALUES (?, ?, ?, ?)",
            )
            .bind(sandbox)
            .bind(slot)
            .bind(&disk.disk)
            .bind(&disk.layer)
            .execute(&mut *tx)
            .await?;
        }
        Ok(())
    }

    pub(crate) async fn disks(&self, sandbox: &str) -> Result<Vec<SandboxDisk>> {
        Ok(
            sqlx::query_as("SELECT disk, layer FROM sandbox_disks WHERE sandbox = ? ORDER BY slot")
                .bind(sandbox)
                .fetch_all(&self.pool)
                .await?,
        )
    }

    pub(crate) async fn set_running(
        tx: &mut SqliteConnection,
        sandbox: &str,
        now: &Incarnation<'_>,
    ) -> Result<()> {
        let updated = sqlx::query(
            "UPDATE sandboxes SET state = 'running', launch = ?, process = ?, ram_sharing = ?, epoch = ?,
             hibernated_as = NULL WHERE id = ?",
        )
        .bind(now.launch)
        .bind(now.process.to_string())
        .bind(now.ram_sharing.word())
        .bind(now.epoch)
        .bind(sandbox)
        .execute(tx)
        .await?;
        if updated.rows_affected() == 1 {
            return Ok(());
        }
        Err(EngineError::new(
            Kind::Conflict,
            format!("record that sandbox {sandbox} runs"),
            "it was removed meanwhile",
        ))
    }

    /// Records that no QEMU runs for the sandbox any more.
    pub(crate) async fn set_not_running(
        &self,
        sandbox: &str,
        state: SandboxState,
        hibernated_as: Option<&str>,
    ) -> Result<()> {
        sqlx::query(
            "UPDATE sandboxes SET state = ?, process = NULL, ram_sharing = NULL, epoch = NULL, hibernated_as = ?
             WHERE id = ?",
        )
        .bind(state.word())
        .bind(hibernated_as)
        .bind(sandbox)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Records that the QEMU `process` of the sandbox is gone, unless the sandbox has another one by now.
    pub(crate) async fn set_crashed(&self, sandbox: &str, process: ProcessId) -> Result<()> {
        sqlx::query(
            "UPDATE sandboxes SET state = 'crashed', process = NULL, ram_sharing = NULL, epoch = NULL
             WHERE id = ? AND process = ?",
        )
        .bind(sandbox)
        .bind(process.to_string())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Records that the sandbox's state is in the store, whether or not its QEMU has ended yet.
    pub(crate) async fn set_hibernated(
        tx: &mut SqliteConnection,
        sandbox: &str,
        checkpoint: &str,
    ) -> Result<()> {
        sqlx::query(
            "UPDATE sandboxes SET state = 'hibernated', process = NULL, ram_sharing = NULL, epoch = NULL,
             launch = NULL, hibernated_as = ? WHERE id = ?",
        )
        .bind(checkpoint)
        .bind(sandbox)
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Records the epoch that the agent of a running sandbox acknowledged.
    pub(crate) async fn set_epoch(&self, sandbox: &str, epoch: &str) -> Result<()> {
        sqlx::query("UPDATE sandboxes SET epoch = ? WHERE id = ? AND process IS NOT NULL")
            .bind(epoch)
            .bind(sandbox)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Records in which epoch a command was asked for, unless it was asked for before; then it gives the epoch of that time.
    pub(crate) async fn first_asked(
        &self,
        sandbox: &str,
        key: &str,
        epoch: &str,
    ) -> Result<Option<String>> {
        let mut tx = self.begin().await?;
        let earlier: Option<(String,)> =
            sqlx::query_as("SELECT epoch FROM command_keys WHERE sandbox = ? AND key = ?")
                .bind(sandbox)
                .bind(key)
                .fetch_optional(&mut *tx)
                .await?;
        if earlier.is_none() {
            sqlx::query("INSERT INTO command_keys (sandbox, key, epoch) VALUES (?, ?, ?)")
                .bind(sandbox)
                .bind(key)
                .bind(epoch)
                .execute(&mut *tx)
                .await?;
            tx.commit().await?;
        }
        Ok(earlier.map(|(epoch,)| epoch))
    }

    pub(crate) async fn set_checkpoint(
        tx: &mut SqliteConnection,
        sandbox: &str,
        checkpoint: &str,
    ) -> Result<()> {
        sqlx::query("UPDATE sandboxes SET checkpoint = ? WHERE id = ?")
            .bind(checkpoint)
            .bind(sandbox)
            .execute(tx)
            .await?;
        Ok(())
    }

    pub(crate) async fn set_machine(
        tx: &mut SqliteConnection,
        sandbox: &str,
        machine: &str,
    ) -> Result<()> {
        sqlx::query("UPDATE sandboxes SET machine = ? WHERE id = ?")
            .bind(machine)
            .bind(sandbox)
            .execute(tx)
            .await?;
        Ok(())
    }

    pub(crate) async fn remove_sandbox(&self, sandbox: &str) -> Result<()> {
        sqlx::query("DELETE FROM sandboxes WHERE id = ?")
            .bind(sandbox)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    // ---- layers

    pub(crate) async fn insert_layer(tx: &mut SqliteConnection, layer: &LayerRow) -> Result<()> {
        sqlx::query(
            "INSERT INTO layers (id, format, parent, virtual_bytes, frozen, content, stamp, created)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        )
        .bind(&layer.id)
        .bind(&layer.format)
        .bind(&layer.parent)
        .bind(layer.virtual_bytes)
        .bind(layer.frozen)
        .bind(&layer.content)
        .bind(&layer.stamp)
        .bind(crate::now())
        .execute(tx)
        .await?;
        Ok(())
    }

    pub(crate) async fn freeze_layer(tx: &mut SqliteConnection, layer: &str) -> Result<()> {
        sqlx::query("UPDATE layers SET frozen = TRUE WHERE id = ?")
            .bind(layer)
            .execute(tx)
            .await?;
        Ok(())
    }

    pub(crate) async fn set_layer_content(
        tx: &mut SqliteConnection,
        layer: &str,
        content: &TreeRef,
    ) -> Result<()> {
        sqlx::query("UPDATE layers SET content = ? WHERE id = ?")
            .bind(to_json(content)?)
            .bind(layer)
            .execute(tx)
            .await?;
        Ok(())
    }

    /// Records what a layer's file looked like when its content was known to be right.
    pub(crate) async fn set_layer_stamp(
        tx: &mut SqliteConnection,
        layer: &str,
        stamp: &str,
    ) -> Result<()> {
        sqlx::query("UPDATE layers SET stamp = ? WHERE id = ?")
            .bind(stamp)
            .bind(layer)
            .execute(tx)
            .await?;
        Ok(())
    }

    /// The layer and everything below it, top first.
    pub(crate) async fn chain(&self, top: &str) -> Result<Vec<LayerRow>> {
        let mut chain: Vec<LayerRow> = Vec::new();
        let mut next = Some(top.to_owned());
        while let Some(id) = next {
            if chain.len() >= crate::layers::DEPTH_MAX {
                return Err(EngineError::internal(
                    format!("list the layers below {top}"),
                    format!("more than {} layers, or a circle", crate::layers::DEPTH_MAX),
                ));
            }
            let layer: LayerRow = sqlx::query_as(
                "SELECT id, format, parent, virtual_bytes, frozen, content, stamp FROM layers WHERE id = ?",
            )
            .bind(&id)
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| {
                EngineError::internal(format!("find layer {id}"), "the database has no such layer")
            })?;
            next = layer.parent.clone();
            chain.push(layer);
        }
        Ok(chain)
    }

    /// Layers that a TreeRef is known of: sources for a fetch.
    pub(crate) async fn layers_with_content(&self) -> Result<Vec<LayerRow>> {
        Ok(sqlx::query_as(
            "SELECT id, format, parent, virtual_bytes, frozen, content, stamp FROM layers
             WHERE content IS NOT NULL AND frozen ORDER BY created",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Puts a layer on another parent, and records what its file looks like now.
    pub(crate) async fn set_layer_parent(
        tx: &mut SqliteConnection,
        layer: &str,
        parent: Option<&str>,
        stamp: &str,
    ) -> Result<()> {
        sqlx::query("UPDATE layers SET parent = ?, stamp = ? WHERE id = ?")
            .bind(parent)
            .bind(stamp)
            .bind(layer)
            .execute(tx)
            .await?;
        Ok(())
    }

    /// What uses which layer.
    pub(crate) async fn layer_uses(tx: &mut SqliteConnection) -> Result<LayerUses> {
        let layers = sqlx::query_as(
            "SELECT id, format, parent, virtual_bytes, frozen, content, stamp FROM layers",
        )
        .fetch_all(&mut *tx)
        .await?;
        let disks = sqlx::query_as("SELECT sandbox, layer FROM sandbox_disks")
            .fetch_all(&mut *tx)
            .await?;
        let named: Vec<(String,)> = sqlx::query_as(
            "SELECT layer FROM templates UNION SELECT layer FROM local_checkpoint_disks",
        )
        .fetch_all(&mut *tx)
        .await?;
        let jobs = sqlx::query_as("SELECT id, kind, sandbox, step, detail, owner FROM jobs")
            .fetch_all(&mut *tx)
            .await?;
        Ok(LayerUses {
            layers,
            disks,
            named: named.into_iter().map(|(layer,)| layer).collect(),
            jobs,
        })
    }

    /// Every layer.
    pub(crate) async fn layers(&self) -> Result<Vec<LayerRow>> {
        Ok(sqlx::query_as(
            "SELECT id, format, parent, virtual_bytes, frozen, content, stamp FROM layers ORDER BY created",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Forgets layers that nothing refers to, newest first, and returns them: their files may go.
    pub(crate) async fn forget_unused_layers(&self) -> Result<Vec<LayerRow>> {
        let mut tx = self.begin().await?;
        let mut forgotten = Vec::new();
        loop {
            let unused: Vec<LayerRow> = sqlx::query_as(
                "SELECT id, format, parent, virtual_bytes, frozen, content, stamp FROM layers l
                 WHERE NOT EXISTS (SELECT 1 FROM layers c WHERE c.parent = l.id)
                   AND NOT EXISTS (SELECT 1 FROM templates t WHERE t.layer = l.id)
                   AND NOT EXISTS (SELECT 1 FROM sandbox_disks d WHERE d.layer = l.id)
                   AND NOT EXISTS (SELECT 1 FROM local_checkpoint_disks d WHERE d.layer = l.id)
                   AND NOT EXISTS (SELECT 1 FROM jobs j WHERE instr(j.detail, l.id) > 0)",
            )
            .fetch_all(&mut *tx)
            .await?;
            if unused.is_empty() {
                break;
            }
            for layer in &unused {
                sqlx::query("DELETE FROM layers WHERE id = ?")
                    .bind(&layer.id)
                    .execute(&mut *tx)
                    .await?;
            }
            forgotten.extend(unused);
        }
        tx.commit().await?;
        Ok(forgotten)
    }

    // ---- templates

    pub(crate) async fn templates(&self) -> Result<Vec<TemplateRow>> {
        Ok(
            sqlx::query_as("SELECT * FROM templates ORDER BY created, name")
                .fetch_all(&self.pool)
                .await?,
        )
    }

    /// Finds by name, by id, or by an id's unique beginning.
    pub(crate) async fn template(&self, name: &str) -> Result<TemplateRow> {
        let all = self.templates().await?;
        if let Some(exact) = all.iter().find(|t| t.name == name || t.id == name) {
            return Ok(exact.clone());
        }
        let mut like = all
            .iter()
            .filter(|t| name.len() >= 4 && t.id.starts_with(name));
        match (like.next(), like.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => Err(EngineError::usage(
                format!("find template {name}"),
                "several ids begin like this",
            )
            .next("give more digits")),
            (None, _) => Err(EngineError::not_found(
                "template",
                name,
                "`stead template ls`",
            )),
        }
    }

    pub(crate) async fn insert_template(
        tx: &mut SqliteConnection,
        template: &TemplateRow,
    ) -> Result<()> {
        sqlx::query(
            "INSERT INTO templates (id, name, layer, kernel, initrd, cmdline, detail, created)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&template.id)
        .bind(&template.name)
        .bind(&template.layer)
        .bind(&template.kernel)
        .bind(&template.initrd)
        .bind(&template.cmdline)
        .bind(&template.detail)
        .bind(&template.created)
        .execute(tx)
        .await
        .map_err(|source| name_taken(source, "template", &template.name))?;
        Ok(())
    }

    pub(crate) async fn remove_template(&self, id: &str) -> Result<()> {
        sqlx::query("DELETE FROM templates WHERE id = ?")
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    // ---- local parts of checkpoints

    pub(crate) async fn insert_local_checkpoint(
        tx: &mut SqliteConnection,
        manifest: &str,
        ram: Option<&str>,
        layers: &[String],
    ) -> Result<()> {
        sqlx::query(
            "INSERT INTO local_checkpoints (manifest, ram) VALUES (?, ?) ON CONFLICT (manifest) DO NOTHING",
        )
        .bind(manifest)
        .bind(ram)
        .execute(&mut *tx)
        .await?;
        for (slot, layer) in (0_i64..).zip(layers) {
            sqlx::query(
                "INSERT INTO local_checkpoint_disks (manifest, slot, layer) VALUES (?, ?, ?)
                 ON CONFLICT (manifest, slot) DO NOTHING",
            )
            .bind(manifest)
            .bind(slot)
            .bind(layer)
            .execute(&mut *tx)
            .await?;
        }
        Ok(())
    }

    /// The layers of a checkpoint that lie here, in the disks' order; `None` if none are known.
    pub(crate) async fn local_checkpoint_layers(
        &self,
        manifest: &str,
    ) -> Result<Option<Vec<String>>> {
        let layers: Vec<(String,)> = sqlx::query_as(
            "SELECT layer FROM local_checkpoint_disks WHERE manifest = ? ORDER BY slot",
        )
        .bind(manifest)
        .fetch_all(&self.pool)
        .await?;
        Ok((!layers.is_empty()).then(|| layers.into_iter().map(|(layer,)| layer).collect()))
    }

    /// Every checkpoint with parts here, with the name of its RAM image.
    pub(crate) async fn local_checkpoints(&self) -> Result<Vec<(String, Option<String>)>> {
        Ok(
            sqlx::query_as("SELECT manifest, ram FROM local_checkpoints ORDER BY manifest")
                .fetch_all(&self.pool)
                .await?,
        )
    }

    pub(crate) async fn remove_local_checkpoint(&self, manifest: &str) -> Result<()> {
        sqlx::query("DELETE FROM local_checkpoints WHERE manifest = ?")
            .bind(manifest)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    // ---- jobs

    pub(crate) async fn insert_job(&self, job: &JobRow) -> Result<()> {
        sqlx::query(
            "INSERT INTO jobs (id, kind, sandbox, step, detail, owner, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&job.id)
        .bind(&job.kind)
        .bind(&job.sandbox)
        .bind(&job.step)
        .bind(&job.detail)
        .bind(&job.owner)
        .bind(crate::now())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    pub(crate) async fn set_job_step(&self, job: &str, step: &str) -> Result<()> {
        sqlx::query("UPDATE jobs SET step = ? WHERE id = ?")
            .bind(step)
            .bind(job)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    pub(crate) async fn set_job_detail(
        tx: &mut SqliteConnection,
        job: &str,
        detail: &str,
    ) -> Result<()> {
        sqlx::query("UPDATE jobs SET detail = ? WHERE id = ?")
            .bind(detail)
            .bind(job)
            .execute(tx)
            .await?;
        Ok(())
    }

    pub(crate) async fn jobs(&self) -> Result<Vec<JobRow>> {
        Ok(sqlx::query_as(
            "SELECT id, kind, sandbox, step, detail, owner FROM jobs ORDER BY created, id",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    pub(crate) async fn remove_job(tx: &mut SqliteConnection, job: &str) -> Result<()> {
        sqlx::query("DELETE FROM jobs WHERE id = ?")
            .bind(job)
            .execute(tx)
            .await?;
        Ok(())
    }
}

pub(crate) fn parse_process(text: &str) -> Result<ProcessId> {
    text.parse()
        .map_err(|source| unreadable("process", text).because(source))
}

pub(crate) fn to_json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|source| EngineError::internal("write a record as JSON", "").because(source))
}

pub(crate) fn from_json<T: serde::de::DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|source| unreadable(what, text).because(source))
}

fn unreadable(what: &str, text: &str) -> EngineError {
    EngineError::internal(
        "read the worker's database",
        format!("{what} {text:?} is not known to this version"),
    )
}

fn name_taken(source: sqlx::Error, what: &str, name: &str) -> EngineError {
    let taken = source
        .as_database_error()
        .is_some_and(sqlx::error::DatabaseError::is_unique_violation);
    if taken {
        return EngineError::new(
            Kind::Conflict,
            format!("create {what} {name}"),
            format!("a {what} of this name exists"),
        )
        .left("nothing was changed")
        .next("choose another name, or remove it first");
    }
    source.into()
}

//! Templates: immutable bases that sandboxes start from, named by content and kept in the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stead_store::{ChunkSize, FileSource, Lineage, Manifest, ManifestId, Producer, Role, Source};
use stead_sys::durable::{self, Existing};
use stead_sys::space;
use stead_template::{
    Base, BuildSpec, BuiltTemplate, DiskIdentity, ImportSpec, PACKAGES_DEFAULT, Recipe,
};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::event::Watch;
use crate::job::{Job, Undo};
use crate::materialise::Cost;
use crate::records::{LayerRow, Records, TemplateRow, from_json, to_json};
use crate::store::store_error;
use crate::{Engine, blobs, blocking, id, layers, now};

/// The agent's file name.
const AGENT: &str = "stead-agent";

/// A template to be built from Debian packages.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// Its name.
    pub name: String,
    /// Debian suite; `None` for the host's.
    pub suite: Option<String>,
    /// Packages besides the usual ones.
    pub packages: Vec<String>,
    /// Leave the usual ones out.
    pub minimal: bool,
    /// No Debian at all: busybox, and the agent as process 1.
    pub busybox: bool,
    /// The disk's size in bytes.
    pub disk_bytes: u64,
    /// The static agent to put inside.
    pub agent: PathBuf,
    /// What makes the file system's identifiers; `None` for the template's name, so that builds of one
    /// name on several workers share most of their bytes.
    pub identity: Option<[u8; 16]>,
}

/// A template to be made of one's own files.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// Its name.
    pub name: String,
    /// The disk image, raw or qcow2.
    pub disk: PathBuf,
    /// The kernel (bzImage).
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A template as it is shown.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateInfo {
    /// 64 hex digits: the BLAKE3 of its manifest.
    pub id: String,
    /// Its name on this worker.
    pub name: String,
    /// The disk's size in bytes.
    pub disk_bytes: u64,
    /// What the disk occupies here, in bytes.
    pub used_bytes: u64,
    /// The name of the disk's content, 64 hex digits.
    pub disk_content: String,
    /// BLAKE3 of the kernel.
    pub kernel: String,
    /// BLAKE3 of the initramfs.
    pub initrd: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// What it was made from.
    pub origin: String,
    /// Installed packages with versions, where known.
    pub packages: Vec<String>,
    /// RFC 3339.
    pub created: String,
}

/// What a template's row and manifest hold besides the files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Detail {
    origin: String,
    packages: Vec<String>,
}

/// The agent that `template build` puts inside when none is named: beside this program, or where the
/// build of the same tree puts it.
///
/// # Errors
/// [`Kind::NotFound`] when it is in none of these places.
pub fn find_agent() -> Result<PathBuf> {
    let own = std::env::current_exe().at("find", "the own program")?;
    let folder = own.parent().unwrap_or(Path::new("."));
    // In a build tree, a build for tests may have left a dynamic one beside this program.
    let candidates = [
        folder.join("../x86_64-unknown-linux-gnu/agent").join(AGENT),
        folder.join(AGENT),
        folder.join("../lib/steadfast").join(AGENT),
    ];
    candidates
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .ok_or_else(|| {
            EngineError::new(
                Kind::NotFound,
                "find the guest agent",
                format!("there is no {AGENT} beside {}", own.display()),
            )
            .next("`make agent` builds it; --agent FILE names another")
        })
}

impl Engine {
    /// Builds a Debian template from apt's configured sources and publishes it.
    ///
    /// # Errors
    /// Anything that fails is undone.
    pub async fn template_build(&self, request: &BuildRequest) -> Result<TemplateInfo> {
        self.check_template_name(&request.name).await?;
        let available =
            space::available_bytes(self.dir.root()).at("ask for room on", self.dir.root())?;
        if available < request.disk_bytes {
            return Err(EngineError::no_space(
                format!("build template {}", request.name),
                self.dir.root(),
                request.disk_bytes,
                available,
            ));
        }
        let watch = self.watch.clone();
        let (request_in, cache) = (request.clone(), self.template_cache());
        self.add_template(&request.name, "template-build", move |out| {
            let built = with_watch(&watch, |watch| {
                stead_template::build(
                    &BuildSpec {
                        recipe: recipe(&request_in),
                        size_bytes: request_in.disk_bytes,
                        identity: identity(&request_in),
                        agent: &request_in.agent,
                        cache: &cache,
                        out,
                    },
                    watch,
                )
            })
            .map_err(|source| template_error(&request_in.name, source))?;
            let origin = format!(
                "Debian {}, kernel {}",
                built.suite.as_deref().unwrap_or("?"),
                built
                    .kernel
                    .as_ref()
                    .map_or("?".to_owned(), |package| package.version.clone())
            );
            Ok((built, origin))
        })
        .await
    }

    /// Makes a template of one's own disk, kernel and initramfs and publishes it.
    ///
    /// # Errors
    /// When a file is not what it should be; anything that fails is undone.
    pub async fn template_import(&self, request: &ImportRequest) -> Result<TemplateInfo> {
        self.check_template_name(&request.name).await?;
        let watch = self.watch.clone();
        let request_in = request.clone();
        self.add_template(&request.name, "template-import", move |out| {
            let built = with_watch(&watch, |watch| {
                stead_template::import(
                    &ImportSpec {
                        disk: &request_in.disk,
                        kernel: &request_in.kernel,
                        initrd: &request_in.initrd,
                        cmdline: Some(&request_in.cmdline),
                        out,
                    },
                    watch,
                )
            })
            .map_err(|source| template_error(&request_in.name, source))?;
            let origin = format!("imported from {}", request_in.disk.display());
            Ok((built, origin))
        })
        .await
    }

    async fn check_template_name(&self, name: &str) -> Result<()> {
        id::check_name("template", name)?;
        if self
            .records
            .templates()
            .await?
            .iter()
            .any(|known| known.name == name)
        {
            return Err(EngineError::new(
                Kind::Conflict,
                format!("create template {name}"),
                "a template of this name exists",
            )
            .left("nothing was changed")
            .next("choose another name, or `stead template rm` it first"));
        }
        Ok(())
    }

    /// Runs `make` in a scratch folder, takes its files in and publishes them.
    async fn add_template(
        &self,
        name: &str,
        kind: &'static str,
        make: impl FnOnce(&Path) -> Result<(BuiltTemplate, String)> + Send + 'static,
    ) -> Result<TemplateInfo> {
        let (layer, scratch) = (id::long()?, id::long()?);
        let mut job = Job::begin(
            &self.records,
            &self.watch,
            kind,
            None,
            Undo {
                layers: vec![layer.clone()],
                builds: vec![scratch.clone()],
                lease: true,
                ..Undo::default()
            },
        )
        .await?;
        let made = async {
            job.step("build").await?;
            let out = self.dir.builds().join(&scratch);
            let (built, origin) = blocking(move || make(&out)).await?;
            self.take_in(&mut job, name, layer, built, origin).await
        }
        .await;
        let id = self.undone_on_error(&job, made).await?;
        let swept = self.sweep().await;
        self.only_notice(
            "scratch files of the build stay until the next command",
            swept,
        );
        self.template(&id).await
    }

    async fn take_in(
        &self,
        job: &mut Job,
        name: &str,
        layer: String,
        built: BuiltTemplate,
        origin: String,
    ) -> Result<String> {
        let path = layers::path_of(&self.dir, &layer, layers::RAW);
        durable::move_to(&built.disk, &path, Existing::Keep).at("take in", &path)?;
        layers::seal(&path)?;
        let stamp = layers::stamp(&path)?;
        let (kernel, kernel_bytes) = blobs::read_file(&built.vmlinuz)?;
        let (initrd, initrd_bytes) = blobs::read_file(&built.initrd)?;
        job.also(|undo| undo.blobs.extend([kernel.clone(), initrd.clone()]))
            .await?;
        blobs::put(&self.dir, &kernel_bytes)?;
        blobs::put(&self.dir, &initrd_bytes)?;
        let detail = Detail {
            origin,
            packages: built
                .packages
                .iter()
                .map(|package| format!("{}={}", package.name, package.version))
                .collect(),
        };
        job.step("publish").await?;
        let (id, content) = self
            .publish_template(
                name,
                &path,
                &kernel_bytes,
                &initrd_bytes,
                &built.cmdline,
                &detail,
            )
            .await?;
        let row = LayerRow {
            id: layer,
            format: layers::RAW.to_owned(),
            parent: None,
            virtual_bytes: i64::try_from(content.length_bytes)
                .map_err(|source| EngineError::internal("record a template", "").because(source))?,
            frozen: true,
            content: Some(to_json(&content)?),
            stamp: Some(stamp),
        };
        let template = TemplateRow {
            id: id.to_string(),
            name: name.to_owned(),
            layer: row.id.clone(),
            kernel,
            initrd,
            cmdline: built.cmdline,
            detail: to_json(&detail)?,
            created: now(),
        };
        let mut tx = self.records.begin().await?;
        Records::insert_layer(&mut tx, &row).await?;
        Records::insert_template(&mut tx, &template).await?;
        job.finish(&mut tx).await?;
        tx.commit().await?;
        Ok(template.id)
    }

    async fn publish_template(
        &self,
        name: &str,
        disk: &Path,
        kernel: &[u8],
        initrd: &[u8],
        cmdline: &str,
        detail: &Detail,
    ) -> Result<(ManifestId, stead_store::TreeRef)> {
        let failed = |source| store_error(format!("publish template {name}"), source);
        let store = self.store().await?;
        let mut publish = store
            .begin_publish(self.lease_owner()?)
            .await
            .map_err(failed)?;
        let file = std::fs::File::open(disk).at("open", disk)?;
        let source: Arc<dyn Source> = Arc::new(FileSource::new(file).at("open", disk)?);
        let progress = self.progress_of("publish disk");
        let tree = publish
            .add_tree(source, ChunkSize::DISK, None, &progress)
            .await
            .map_err(failed)?;
        let manifest = Manifest {
            role: Role::Template,
            name: Some(name.to_owned()),
            created: jiff::Timestamp::now(),
            kind: stead_store::Kind::DiskOnly,
            crash_consistent: false,
            lineage: Lineage::default(),
            producer: Producer {
                kernel_command_line: Some(cmdline.to_owned()),
                ..Producer::default()
            },
            disks: vec![stead_store::Disk {
                id: "vda".to_owned(),
                tree,
                virtual_size_bytes: tree.length_bytes,
            }],
            ram: None,
            device_state: None,
            kernel: Some(publish.add_blob(kernel).await.map_err(failed)?),
            initrd: Some(publish.add_blob(initrd).await.map_err(failed)?),
            machine: serde_json::to_value(detail)
                .map_err(|source| EngineError::internal("write a manifest", "").because(source))?,
        };
        let (id, _) = publish.commit(&manifest).await.map_err(failed)?;
        Ok((id, tree))
    }

    /// The template of that name: this worker's, or one of the store that is then brought here.
    pub(crate) async fn template_row(&self, name: &str) -> Result<TemplateRow> {
        let missing = match self.records.template(name).await {
            Err(error) if error.kind() == Kind::NotFound => error,
            other => return other,
        };
        let Some((id, manifest)) = self.find_manifest(Role::Template, name).await? else {
            return Err(missing);
        };
        let mut job = Job::begin(
            &self.records,
            &self.watch,
            "template-fetch",
            None,
            Undo::default(),
        )
        .await?;
        let fetched = self.fetch_template(&mut job, id, manifest).await;
        self.undone_on_error(&job, fetched).await
    }

    async fn fetch_template(
        &self,
        job: &mut Job,
        id: ManifestId,
        manifest: Manifest,
    ) -> Result<TemplateRow> {
        let incomplete = || {
            EngineError::new(
                Kind::Damaged,
                format!("fetch template {id}"),
                "its manifest lacks a part",
            )
        };
        let detail: Detail = from_json("template detail", &manifest.machine.to_string())?;
        let disk = manifest.disks.first().ok_or_else(incomplete)?;
        job.step("fetch").await?;
        let mut cost = Cost::default();
        let layer = self
            .layer_of_content(job, &disk.id, &disk.tree, &mut cost)
            .await?;
        let store = self.store().await?;
        let mut names = Vec::new();
        for blob in [&manifest.kernel, &manifest.initrd] {
            let blob = blob.as_ref().ok_or_else(incomplete)?;
            let bytes = store
                .fetch_blob(blob)
                .await
                .map_err(|source| store_error("fetch a template's kernel", source))?;
            let name = blobs::name_of(&bytes);
            job.also(|undo| undo.blobs.push(name.clone())).await?;
            names.push(blobs::put(&self.dir, &bytes)?);
        }
        let template = TemplateRow {
            id: id.to_string(),
            name: manifest.name.clone().unwrap_or_else(|| id.to_string()),
            layer: layer.id,
            initrd: names.pop().ok_or_else(incomplete)?,
            kernel: names.pop().ok_or_else(incomplete)?,
            cmdline: manifest
                .producer
                .kernel_command_line
                .clone()
                .unwrap_or_default(),
            detail: to_json(&detail)?,
            created: now(),
        };
        let mut tx = self.records.begin().await?;
        Records::insert_template(&mut tx, &template).await?;
        job.finish(&mut tx).await?;
        tx.commit().await?;
        Ok(template)
    }

    /// Every template of this worker.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        let mut all = Vec::new();
        for row in self.records.templates().await? {
            all.push(self.template_info(row).await?);
        }
        Ok(all)
    }

    /// One template of this worker, by name, id, or the beginning of an id.
    ///
    /// # Errors
    /// When there is none or more than one.
    pub async fn template(&self, name: &str) -> Result<TemplateInfo> {
        let row = self.records.template(name).await?;
        self.template_info(row).await
    }

    /// Removes a template from this worker and the store. Sandboxes and checkpoints made of it stay.
    ///
    /// # Errors
    /// When there is none of that name.
    pub async fn template_remove(&self, name: &str) -> Result<()> {
        let row = self.records.template(name).await?;
        if let Some((id, _)) = self.find_manifest(Role::Template, &row.id).await? {
            self.store()
                .await?
                .remove_manifest(id)
                .await
                .map_err(|source| store_error(format!("remove template {name}"), source))?;
        }
        self.records.remove_template(&row.id).await?;
        self.sweep().await
    }

    async fn template_info(&self, row: TemplateRow) -> Result<TemplateInfo> {
        let detail: Detail = from_json("template detail", &row.detail)?;
        let layer = self.base_layer(&row.layer).await?;
        let path = layers::path_of(&self.dir, &layer.id, &layer.format);
        let content = crate::materialise::content_of(&layer)?;
        Ok(TemplateInfo {
            disk_bytes: layers::bytes(&layer)?,
            used_bytes: space::allocated_bytes(&path).at("measure", &path)?,
            disk_content: content
                .map(|tree| tree.root.to_string())
                .unwrap_or_default(),
            id: row.id,
            name: row.name,
            kernel: row.kernel,
            initrd: row.initrd,
            cmdline: row.cmdline,
            origin: detail.origin,
            packages: detail.packages,
            created: row.created,
        })
    }

    fn template_cache(&self) -> PathBuf {
        self.settings
            .template_cache
            .clone()
            .unwrap_or_else(|| self.dir.cache().join("template"))
    }
}

fn recipe(request: &BuildRequest) -> Recipe {
    let usual = PACKAGES_DEFAULT.iter().map(|name| (*name).to_owned());
    let own = request.packages.iter().cloned();
    Recipe {
        base: match request.busybox {
            true => Base::Minimal,
            false => Base::Debian,
        },
        suite: request.suite.clone(),
        packages: if request.minimal || request.busybox {
            own.collect()
        } else {
            usual.chain(own).collect()
        },
    }
}

fn identity(request: &BuildRequest) -> DiskIdentity {
    match &request.identity {
        Some(seed) => DiskIdentity::from_seed(seed),
        None => DiskIdentity::from_seed(request.name.as_bytes()),
    }
}

/// Passes a build's news on to whoever watches, and their wish to stop to the build.
fn with_watch<T>(watch: &Watch, work: impl FnOnce(&stead_template::Watch<'_>) -> T) -> T {
    let report = |progress: stead_template::Progress<'_>| match progress {
        stead_template::Progress::Stage(stage) => watch.step("template", stage.to_string()),
        stead_template::Progress::Cached(stage) => tracing::info!(%stage, "cached"),
        stead_template::Progress::Line(line) => tracing::debug!(line),
    };
    // The very flag: a program that says nothing for minutes is ended too.
    work(&stead_template::Watch::new(&report, watch.wish_to_stop()))
}

fn template_error(name: &str, source: stead_template::TemplateError) -> EngineError {
    use std::io::ErrorKind;
    use stead_template::TemplateError as Source;
    let kind = match &source {
        Source::NeedsRoot { .. }
        | Source::NoSource { .. }
        | Source::Invalid { .. }
        | Source::ProgramMissing { .. }
        | Source::Unsuitable { .. } => Kind::Usage,
        Source::Io { source, .. } if source.kind() == ErrorKind::NotFound => Kind::Usage,
        Source::Io { source, .. } if source.kind() == ErrorKind::StorageFull => Kind::NoSpace,
        Source::NoRoom { .. } => Kind::NoSpace,
        Source::Cancelled { .. } => Kind::Cancelled,
        Source::ProgramFailed { .. }
        | Source::ProgramTooSlow { .. }
        | Source::Answer { .. }
        | Source::Io { .. } => Kind::Internal,
    };
    EngineError::new(kind, format!("make template {name}"), "")
        .because(source)
        .left("nothing was changed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_to_stop_reaches_a_build_that_says_nothing() {
        let watch = Watch::silent();
        with_watch(&watch, |build| {
            assert!(!build.is_cancelled());
            watch.cancel();
            assert!(build.is_cancelled(), "no line was reported meanwhile");
        });
    }
}

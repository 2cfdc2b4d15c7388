//! Running a save image as a new sandbox: ours, or one of libvirt's whose machine is like ours.
//!
//! ```text
//!   image read to its end ▶ machine fits here? ▶ disks copied, compared with the record ▶ RAM and device state taken
//!   apart ▶ QEMU with the state loaded ▶ agent acknowledges = ready
//! ```
//! The sandbox has copies of the disks: the image and its disks stay as they are, and can be restored again. Nothing is
//! started before everything is proven, and whatever fails leaves no sandbox, no process and no files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use stead_qcow2::Chain;
use stead_save_image::{Control, DiskContent, SaveImage};
use stead_store::TreeRef;
use stead_sys::durable::{Existing, Partial};
use stead_vmm::StateFormat;

use crate::disk_content::{name_file, tree_of_content};
use crate::domain::{Domain, LIBVIRT_RAM};
use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::{Job, Undo};
use crate::launch::{
    Identity, Incoming, LaunchPlan, RamPlan, Reason, Running, new_vm_user, owner, seal_image,
};
use crate::machine::MachineRecord;
use crate::records::{LayerRow, Records, Sandbox, SandboxState, to_json};
use crate::restore::RESTORE_TIMEOUT;
use crate::{Engine, SandboxInfo, blobs, blocking, id, layers, now};

/// How much of a disk is copied at a time.
const STEP_BYTES: usize = 1 << 20;

/// A sandbox about to be made of an image.
struct Making {
    row: Sandbox,
    machine: MachineRecord,
    launch: String,
    ram: String,
    /// Each disk's copy, and the overlay that the guest writes to.
    disks: Vec<(LayerRow, LayerRow)>,
}

impl Engine {
    /// Starts a new sandbox from a save image, where its VM was.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the image is incomplete or damaged or a disk is not as it was, [`Kind::Incompatible`] when
    /// the machine is not one of ours or does not fit here, and whatever starting may meet. Nothing is left then.
    pub async fn save_restore(&self, file: &Path, name: Option<&str>) -> Result<SandboxInfo> {
        let image = Arc::new(self.proven_image(file).await?);
        let here = self.qemu().await?.version();
        let domain = Domain::of_xml(image.xml(), here)?;
        self.check_machine(&format!("save image {}", file.display()), &domain.machine)
            .await?;
        let making = self.making(&domain, name)?;
        let lock = self.lock_new(&making.row, "restore").await?;
        let job = Job::begin(
            &self.records,
            &self.watch,
            "save-restore",
            Some(&making.row.id),
            Undo {
                launches: vec![making.launch.clone()],
                sandboxes: vec![making.row.id.clone()],
                layers: (making.disks.iter())
                    .flat_map(|(copy, overlay)| [copy.id.clone(), overlay.id.clone()])
                    .collect(),
                ram: vec![making.ram.clone()],
                ..Undo::default()
            },
        )
        .await?;
        let sandbox = making.row.id.clone();
        let made = self.run_image(&job, making, &domain, image).await;
        self.undone_on_error(&job, made).await?;
        drop(lock);
        self.sweep().await?;
        self.sandbox(&sandbox).await
    }

    /// Reads the image to its end.
    pub(crate) async fn proven_image(&self, file: &Path) -> Result<SaveImage> {
        self.watch.step("save-restore", "verify");
        let path = file.to_owned();
        let control = self.control_of("verify");
        let image = blocking(move || {
            let image = SaveImage::open(&path)?;
            image.verify(&control)?.require_whole()?;
            Ok(image)
        })
        .await?;
        if image.disks().is_empty() {
            self.watch.notice(
                "the image does not say what its disks held: that they have not moved on cannot be proven",
            );
        }
        Ok(image)
    }

    fn control_of(&self, what: &'static str) -> Control {
        let watch = self.watch.clone();
        Control::new(move |progress| watch.progress(what, progress.done, progress.total))
    }

    /// The machine's record; its kernel and initramfs lie here then.
    pub(crate) fn machine_record(&self, domain: &Domain) -> Result<MachineRecord> {
        let blob = |path: &Path| blobs::put(&self.dir, &blobs::read_file(path)?.1);
        Ok(MachineRecord {
            qemu: domain.machine.clone(),
            kernel: blob(&domain.kernel)?,
            initrd: blob(&domain.initrd)?,
            cmdline: domain.cmdline.clone(),
            agent: domain.agent,
        })
    }

    fn making(&self, domain: &Domain, name: Option<&str>) -> Result<Making> {
        let id = id::short()?;
        let name = name.unwrap_or(&id).to_owned();
        id::check_name("sandbox", &name)?;
        let machine = self.machine_record(domain)?;
        let row = Sandbox {
            id,
            name,
            state: SandboxState::Creating,
            template: String::new(),
            machine: to_json(&machine)?,
            vm_user: new_vm_user()?,
            epoch: None,
            launch: None,
            process: None,
            ram_sharing: None,
            checkpoint: None,
            hibernated_as: None,
            created: now(),
        };
        let making = Making {
            row,
            machine,
            launch: id::long()?,
            ram: id::long()?,
            disks: Vec::new(),
        };
        making.with_disks(domain)
    }

    async fn run_image(
        &self,
        job: &Job,
        making: Making,
        domain: &Domain,
        image: Arc<SaveImage>,
    ) -> Result<()> {
        job.step("disks").await?;
        let mut tx = self.records.begin().await?;
        for (copy, _) in &making.disks {
            Records::insert_layer(&mut tx, copy).await?;
        }
        tx.commit().await?;
        for ((name, source), (copy, _)) in
            (domain.machine.disks.iter().zip(&domain.disks)).zip(&making.disks)
        {
            let path = layers::path_of(&self.dir, &copy.id, layers::RAW);
            let recorded = image
                .disks()
                .iter()
                .find(|disk| disk.name == *name)
                .cloned();
            let content = self.copy_disk(name, source, &path, recorded).await?;
            let mut tx = self.records.begin().await?;
            Records::set_layer_content(&mut tx, &copy.id, &content).await?;
            Records::set_layer_stamp(&mut tx, &copy.id, &layers::stamp(&path)?).await?;
            tx.commit().await?;
        }
        job.step("memory").await?;
        let (ram, memory_bytes) = (&making.ram, making.machine.qemu.memory_bytes);
        let state = self.take_memory(ram, memory_bytes, image).await?;
        job.step("start").await?;
        let running = self.start_image(&making, state).await?;
        let mut tx = self.records.begin().await?;
        Records::set_running(
            &mut tx,
            &making.row.id,
            &running.incarnation(&making.launch),
        )
        .await?;
        job.finish(&mut tx).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Copies what a guest sees of a disk, and compares the copy with what the image says.
    async fn copy_disk(
        &self,
        name: &str,
        source: &[stead_qcow2::LayerFile],
        path: &Path,
        recorded: Option<DiskContent>,
    ) -> Result<TreeRef> {
        let (name, source, path) = (name.to_owned(), source.to_vec(), path.to_owned());
        let watch = self.watch.clone();
        let progress = self.progress_of("compare disk");
        let root = self.dir.root();
        let room = stead_sys::space::available_bytes(root).at("ask for room on", root)?;
        blocking(move || {
            let chain = Chain::open(&source).map_err(|error| moved(&name, "").because(error))?;
            let partial = Partial::create(&path, 0o600).at("create", &path)?;
            copy_chain(&chain, partial.file(), &watch, room)
                .map_err(|error| EngineError::file("copy a disk to", &path, error))?;
            let found = name_file(partial.file(), &path, &progress)?;
            match recorded {
                Some(recorded) if tree_of_content(&recorded) != found => {
                    let sizes = format!(
                        "it has other content than when the VM was saved ({} bytes then, {} now)",
                        recorded.bytes, found.length_bytes
                    );
                    return Err(moved(&name, &sizes));
                }
                Some(_) | None => {}
            }
            partial.publish(Existing::Keep).at("publish", &path)?;
            layers::seal(&path)?;
            Ok(found)
        })
        .await
    }

    /// Puts the guest's memory into its file and gives the state of the devices.
    pub(crate) async fn take_memory(
        &self,
        ram: &str,
        memory_bytes: u64,
        image: Arc<SaveImage>,
    ) -> Result<Vec<u8>> {
        let path = self.ram_image(ram);
        blocking(move || {
            let partial = Partial::create(&path, 0o600).at("create", &path)?;
            let state = stead_vmm::take_apart(
                image.stream()?,
                LIBVIRT_RAM,
                partial.file(),
                memory_bytes,
                stead_vmm::STATE_BYTES_MAX,
            )
            .map_err(|source| {
                let attempt = format!("read the memory in {}", image.path().display());
                EngineError::new(Kind::Damaged, attempt, "")
                    .because(source)
                    .left("nothing was started")
            })?;
            partial.publish(Existing::Keep).at("publish", &path)?;
            seal_image(&path)?;
            Ok(state)
        })
        .await
    }

    async fn start_image(&self, making: &Making, state: Vec<u8>) -> Result<Running> {
        let overlays: Vec<LayerRow> = making.disks.iter().map(|(_, top)| top.clone()).collect();
        let disks = self
            .insert_with_disks(&making.row, &making.machine, &overlays)
            .await?;
        for (copy, overlay) in &making.disks {
            let user = owner(making.row.vm_user);
            layers::create_overlay_file(&self.dir, overlay, Some(copy), user)?;
        }
        self.launch(&LaunchPlan {
            launch: &making.launch,
            sandbox: &making.row,
            machine: &making.machine,
            disks: &disks,
            ram: RamPlan::Image(self.ram_image(&making.ram)),
            incoming: Some(Incoming {
                device_state: Arc::new(state),
                format: StateFormat::RamSplit,
            }),
            reason: Reason::Restore,
            identity: Identity::Keep,
            timeout: RESTORE_TIMEOUT,
        })
        .await
    }
}

impl Making {
    fn with_disks(mut self, domain: &Domain) -> Result<Self> {
        for (name, source) in domain.machine.disks.iter().zip(&domain.disks) {
            let chain = Chain::open(source).map_err(|error| moved(name, "").because(error))?;
            let bytes = i64::try_from(chain.len()).map_err(|error| {
                EngineError::internal(format!("measure disk {name}"), "").because(error)
            })?;
            let copy = LayerRow {
                id: id::long()?,
                format: layers::RAW.to_owned(),
                parent: None,
                virtual_bytes: bytes,
                frozen: true,
                content: None,
                stamp: None,
            };
            let overlay = layers::new_overlay(&id::long()?, &copy, bytes);
            self.disks.push((copy, overlay));
        }
        Ok(self)
    }
}

pub(crate) fn moved(disk: &str, found: &str) -> EngineError {
    EngineError::new(
        Kind::Damaged,
        format!("use disk {disk} of the image"),
        found,
    )
    .left("nothing was started, and image and disk are as they were")
    .next(
        "bring back the disk as it was when the VM was saved; its memory does not fit another one",
    )
}

/// Copies data and leaves zeros as holes.
fn copy_chain(
    chain: &Chain,
    to: &File,
    watch: &crate::Watch,
    room_bytes: u64,
) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let total = chain.len();
    to.set_len(total)?;
    let mut buffer = vec![0; STEP_BYTES];
    let mut written = 0_u64;
    let mut at = 0;
    while let Some(data) = chain.next_data(at).map_err(std::io::Error::other)? {
        if watch.is_cancelled() {
            return Err(std::io::Error::other("interrupted"));
        }
        at = data.start.max(at);
        let length = usize::try_from((data.end - at).min(STEP_BYTES as u64));
        let piece = &mut buffer[..length.map_err(std::io::Error::other)?];
        chain.read_at(at, piece).map_err(std::io::Error::other)?;
        if !stead_sys::copy::is_zero(piece) {
            written += piece.len() as u64;
            if written > room_bytes {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            to.write_all_at(piece, at)?;
        }
        at += piece.len() as u64;
        watch.progress("copy disk", at, total);
    }
    Ok(())
}

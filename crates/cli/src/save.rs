//! `stead save`: libvirt's save images. Only what runs VMs opens a worker.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use stead_engine::{Engine, EngineError, Kind, Result, SaveRequest, Settings, Watch};
use stead_save_image::{
    Change, Control, Format, Info, Report, SaveImage, SaveImageError, convert, edit_xml, extract,
    extract_to,
};
use stead_sys::durable::Existing;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{
    Place, SaveCommand, SaveConvertArgs, SaveEditArgs, SaveExtractArgs, SaveFormat,
    SaveRestoreArgs, SaveVerifyArgs, SaveWriteArgs,
};
use crate::commands::cancel_on_interrupt;
use crate::editor::Draft;
use crate::print;
use crate::size::human;

/// Runs a command and returns the exit status.
pub async fn run(
    command: SaveCommand,
    settings: Result<Settings>,
    watch: Watch,
    json: bool,
) -> Result<u8> {
    let what = match &command {
        SaveCommand::Write(args) => return write(args, settings?, watch, json).await,
        SaveCommand::Restore(args) => return restore(args, settings?, watch, json).await,
        SaveCommand::Convert(args) if has_checkpoint(args) => {
            return convert_checkpoint(args, settings?, watch, json).await;
        }
        SaveCommand::Info(_) | SaveCommand::DumpXml(_) => "read",
        SaveCommand::Verify(_) => "verify",
        SaveCommand::EditXml(_) => "edit",
        SaveCommand::Convert(_) => "convert",
        SaveCommand::Extract(_) => "extract",
    };
    let control = control(&watch, what);
    let wish = control.clone();
    let hand = watch.clone();
    let listener = tokio::spawn(async move {
        watch.cancelled().await;
        wish.cancel();
    });
    let outcome = match command {
        SaveCommand::EditXml(args) if args.xml.is_none() => {
            let edited = edit_by_hand(args, &hand, json).await?;
            on_a_thread(move || edited.save(&control)).await
        }
        command @ (SaveCommand::EditXml(_)
        | SaveCommand::Info(_)
        | SaveCommand::DumpXml(_)
        | SaveCommand::Verify(_)
        | SaveCommand::Convert(_)
        | SaveCommand::Extract(_)
        | SaveCommand::Write(_)
        | SaveCommand::Restore(_)) => {
            on_a_thread(move || dispatch(command, &control, &hand, json)).await
        }
    };
    listener.abort();
    outcome
}

async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|source| {
        EngineError::new(Kind::Internal, "work on a save image", "").because(source)
    })?
}

/// Whether an editor is started, which interrupts are for.
pub fn starts_editor(command: &SaveCommand) -> bool {
    matches!(command, SaveCommand::EditXml(args) if args.xml.is_none())
}

fn control(watch: &Watch, what: &'static str) -> Control {
    let watch = watch.clone();
    Control::new(move |progress| watch.progress(what, progress.done, progress.total))
}

fn dispatch(command: SaveCommand, control: &Control, watch: &Watch, json: bool) -> Result<u8> {
    match command {
        SaveCommand::Info(one) => Ok(info(&open(&one.file)?.info(), json)),
        SaveCommand::DumpXml(one) => dump_xml(&open(&one.file)?, json),
        SaveCommand::Verify(args) => verify(&args, control, watch, json),
        SaveCommand::EditXml(args) => match &args.xml {
            Some(xml) => edit(&args, xml, control, json),
            None => unreachable!("handled with an editor"),
        },
        SaveCommand::Convert(args) => change_format(&args, control, json),
        SaveCommand::Extract(args) => take_stream(&args, control, json),
        SaveCommand::Write(_) | SaveCommand::Restore(_) => {
            unreachable!("handled with a worker")
        }
    }
}

async fn write(args: &SaveWriteArgs, settings: Settings, watch: Watch, json: bool) -> Result<u8> {
    let engine = Engine::open(settings, watch).await?;
    let request = SaveRequest {
        file: args.file.clone(),
        format: format(args.format),
        stop: args.stop,
    };
    let report = engine.save_write(&args.name, &request).await?;
    if json {
        return Ok(print::json(&report));
    }
    let paused_ms = report.pause.paused_us / 1000;
    Ok(print::line(&format!(
        "{}  {}  guest stood still {paused_ms} ms",
        report.file.display(),
        human(report.file_bytes)
    )))
}

async fn restore(
    args: &SaveRestoreArgs,
    settings: Settings,
    watch: Watch,
    json: bool,
) -> Result<u8> {
    let engine = Engine::open(settings, watch).await?;
    let sandbox = engine
        .save_restore(&args.file, args.name.as_deref())
        .await?;
    if json {
        return Ok(print::json(&sandbox));
    }
    Ok(print::line(&sandbox.name))
}

fn has_checkpoint(args: &SaveConvertArgs) -> bool {
    matches!(args.file, Place::Checkpoint(_)) || matches!(args.to, Place::Checkpoint(_))
}

/// Makes a save image of a checkpoint, or a checkpoint of a save image.
async fn convert_checkpoint(
    args: &SaveConvertArgs,
    settings: Settings,
    watch: Watch,
    json: bool,
) -> Result<u8> {
    let refused = |found: &str, next: &str| {
        EngineError::new(Kind::Usage, "convert", found)
            .left("nothing was changed")
            .next(next)
    };
    if args.force {
        let next = "remove what is in the way first";
        return Err(refused("--force is for an image made of an image", next));
    }
    match (&args.file, &args.to) {
        (Place::Checkpoint(name), Place::File(to)) => {
            let format = format(wanted_format(args)?);
            let engine = Engine::open(settings, watch).await?;
            let saved = engine.save_of_checkpoint(name, to, format).await?;
            if json {
                return Ok(print::json(&saved));
            }
            let (file, bytes) = (saved.file.display(), human(saved.file_bytes));
            Ok(print::line(&format!("{file}  {bytes}")))
        }
        (Place::File(file), Place::Checkpoint(name)) => {
            let engine = Engine::open(settings, watch).await?;
            let made = engine.checkpoint_of_save(file, Some(name)).await?;
            if json {
                return Ok(print::json(&made));
            }
            Ok(print::line(&format!("{name}  {}", made.id)))
        }
        (Place::Checkpoint(_), Place::Checkpoint(_)) | (Place::File(_), Place::File(_)) => {
            let next = "name a save image on one side and checkpoint:NAME on the other";
            Err(refused("both sides are checkpoints", next))
        }
    }
}

fn wanted_format(args: &SaveConvertArgs) -> Result<SaveFormat> {
    args.format.ok_or_else(|| {
        EngineError::new(
            Kind::Usage,
            "convert",
            "no format is given for the new image",
        )
        .left("nothing was changed")
        .next("give one with --format, for instance raw or zstd")
    })
}

fn format(format: SaveFormat) -> Format {
    match format {
        SaveFormat::Raw => Format::Raw,
        SaveFormat::Gzip => Format::Gzip,
        SaveFormat::Bzip2 => Format::Bzip2,
        SaveFormat::Xz => Format::Xz,
        SaveFormat::Lzop => Format::Lzop,
        SaveFormat::Zstd => Format::Zstd,
    }
}

fn open(path: &Path) -> Result<SaveImage> {
    SaveImage::open(path).map_err(told)
}

fn told(error: SaveImageError) -> EngineError {
    error.into()
}

fn info(info: &Info, json: bool) -> u8 {
    if json {
        return print::json(info);
    }
    let mut rows = vec![
        ("file", info.path.display().to_string()),
        ("state", "says that it is complete".to_owned()),
        ("format", info.format.to_owned()),
        (
            "vm was",
            if info.was_running {
                "running"
            } else {
                "paused"
            }
            .to_owned(),
        ),
        (
            "version",
            format!("{}, {}-endian", info.version, info.byte_order),
        ),
        ("xml", human(info.xml_bytes)),
        (
            "payload",
            format!("{} at byte {}", human(info.payload_bytes), info.payload_at),
        ),
    ];
    match &info.record {
        Some(record) => {
            rows.push(("stream", human(record.stream_bytes)));
            rows.push(("blake3", record.payload_hash.clone()));
            for disk in &record.disks {
                rows.push(("disk", format!("{}  {}", disk.name, human(disk.bytes))));
            }
        }
        None => rows.push((
            "record",
            info.record_problem.clone().unwrap_or("none".to_owned()),
        )),
    }
    for what in &info.unproven {
        rows.push(("unproven", what.clone()));
    }
    print::fields(&rows)
}

fn dump_xml(image: &SaveImage, json: bool) -> Result<u8> {
    if json {
        let value = serde_json::json!({ "xml": image.xml(), "cookie": image.cookie() });
        return Ok(print::json(&value));
    }
    Ok(print::bytes(image.xml().as_bytes()))
}

fn verify(args: &SaveVerifyArgs, control: &Control, watch: &Watch, json: bool) -> Result<u8> {
    let image = open(&args.file)?;
    let report = image.verify(control).map_err(told)?;
    let printed = if json {
        print::json(&report)
    } else {
        show(&report)
    };
    report.require_whole().map_err(told)?;
    for (name, path) in &args.disks {
        let content = stead_engine::disk_content(name, path, watch)?;
        image.verify_disk(&content).map_err(told)?;
    }
    Ok(printed)
}

fn show(report: &Report) -> u8 {
    let mut rows = vec![("file", report.path.display().to_string())];
    for what in &report.proven {
        rows.push(("proven", what.clone()));
    }
    for damage in &report.damage {
        let (part, from, to) = (damage.part, damage.from, damage.to);
        rows.push((
            "damaged",
            format!("{part}, bytes {from} to {to}: {}", damage.what),
        ));
    }
    for what in &report.unproven {
        rows.push(("unproven", what.clone()));
    }
    if let Some(stream) = &report.stream {
        let text = format!(
            "{}, {} sections, {} of RAM",
            stream.machine_type,
            stream.sections,
            human(stream.ram_bytes)
        );
        rows.push(("stream", text));
    }
    print::fields(&rows)
}

fn unreadable(path: &Path, source: std::io::Error) -> EngineError {
    let kind = if source.kind() == std::io::ErrorKind::NotFound {
        Kind::NotFound
    } else {
        Kind::Internal
    };
    EngineError::new(kind, format!("read {}", path.display()), "")
        .because(source)
        .left("nothing was changed")
        .next("name a file that is there and can be read")
}

fn edit(args: &SaveEditArgs, xml: &Path, control: &Control, json: bool) -> Result<u8> {
    let text = read_text(xml).map_err(|source| unreadable(xml, source))?;
    let change = edit_xml(&args.file, &text, control).map_err(told)?;
    Ok(changed(&args.file, &change, json))
}

/// Lets the user change the XML. Until the editor has ended, interrupts are for it.
async fn edit_by_hand(args: SaveEditArgs, watch: &Watch, json: bool) -> Result<Edited> {
    if json {
        let attempt = format!("edit the XML of {}", args.file.display());
        let found = "an editor and a program cannot share standard output";
        return Err(EngineError::new(Kind::Usage, attempt, found)
            .left("nothing was changed")
            .next("give the new XML with --xml"));
    }
    let interrupts = signal(SignalKind::interrupt()).map_err(|source| {
        EngineError::new(Kind::Internal, "leave interrupts to the editor", "").because(source)
    })?;
    let work = move || {
        let before = open(&args.file)?.xml().to_owned();
        let draft = Draft::new(&before)?;
        let after = draft.edit()?;
        Ok(Edited {
            file: args.file,
            before,
            after,
            draft,
        })
    };
    let edited = on_a_thread(work).await;
    drop(interrupts);
    cancel_on_interrupt(watch.clone(), "interrupted; nothing is changed");
    edited
}

/// A text that came back from the editor.
struct Edited {
    file: PathBuf,
    before: String,
    after: String,
    draft: Draft,
}

impl Edited {
    /// Puts it into the image, unless it is what was there; where that fails, the user's work is kept.
    fn save(self, control: &Control) -> Result<u8> {
        if self.after == self.before {
            return Ok(print::line(&format!(
                "{}  not changed",
                self.file.display()
            )));
        }
        match self.put(control) {
            Ok(change) => Ok(changed(&self.file, &change, false)),
            Err(error) => {
                let kept = self.draft.keep();
                let (file, kept) = (self.file.display(), kept.display());
                Err(error
                    .left(format!("the edited XML is in {kept}"))
                    .next(format!(
                        "stead save edit-xml {file} --xml {kept}, once it is right"
                    )))
            }
        }
    }

    fn put(&self, control: &Control) -> Result<Change> {
        if open(&self.file)?.xml() == self.before {
            return edit_xml(&self.file, &self.after, control).map_err(told);
        }
        let attempt = format!("edit the XML of {}", self.file.display());
        let found = "somebody else changed it since the editor was started";
        Err(EngineError::new(Kind::Conflict, attempt, found))
    }
}

fn read_text(path: &Path) -> std::io::Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text)?;
        return Ok(text);
    }
    fs::read_to_string(path)
}

fn change_format(args: &SaveConvertArgs, control: &Control, json: bool) -> Result<u8> {
    let (Place::File(file), Place::File(to)) = (&args.file, &args.to) else {
        unreachable!("handled with a worker")
    };
    let format = format(wanted_format(args)?);
    let change = convert(file, to, format, existing(args.force), control).map_err(told)?;
    Ok(changed(to, &change, json))
}

fn existing(force: bool) -> Existing {
    if force {
        Existing::Replace
    } else {
        Existing::Keep
    }
}

fn changed(path: &Path, change: &Change, json: bool) -> u8 {
    if json {
        return print::json(&serde_json::json!({
            "file": path,
            "bytes_before": change.bytes_before,
            "bytes": change.bytes_after,
            "recorded": change.recorded,
        }));
    }
    print::line(&format!(
        "{}  {}",
        path.display(),
        human(change.bytes_after)
    ))
}

fn take_stream(args: &SaveExtractArgs, control: &Control, json: bool) -> Result<u8> {
    let image = open(&args.file)?;
    if args.to == Path::new("-") {
        extract_to(&image, &mut std::io::stdout().lock(), control).map_err(told)?;
        return Ok(0);
    }
    let bytes = extract(&image, &args.to, existing(args.force), control).map_err(told)?;
    if json {
        let value = serde_json::json!({ "file": args.to, "bytes": bytes });
        return Ok(print::json(&value));
    }
    Ok(print::line(&format!(
        "{}  {}",
        args.to.display(),
        human(bytes)
    )))
}

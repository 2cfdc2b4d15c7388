//! The command line: what can be said, with an example for each command.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Keep the state of virtual machines: capture, publish, verify, restore, fork.
#[derive(Debug, Parser)]
#[command(
    name = "stead",
    version,
    max_term_width = 100,
    after_help = "Example:\n  stead template build debian\n  stead create debian --name web\n  stead checkpoint create web --name before-upgrade\n  stead fork before-upgrade -n 10"
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Folder of this worker [default: /var/lib/steadfast as root, else ~/.local/share/steadfast]
    #[arg(long, global = true, env = "STEAD_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where checkpoints are kept: a folder, or s3://BUCKET/PREFIX [default: the folder `store` in the data directory]
    #[arg(long, global = true, env = "STEAD_STORE", value_name = "URL")]
    pub store: Option<String>,
    /// Where template builds keep packages that were already fetched and installed [default: in the data directory]
    #[arg(
        long,
        global = true,
        env = "STEAD_TEMPLATE_CACHE",
        value_name = "DIR",
        hide = true
    )]
    pub template_cache: Option<PathBuf>,
    /// Print the result as JSON on standard output, and events as JSON lines on standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Show no progress; notices and errors are still shown
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// How long to wait for another command that works on the same sandbox
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 30)]
    pub wait: u64,
    /// Write what is done, step by step, to standard error; repeat for more
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build, import, list and remove templates (immutable base images with a kernel)
    #[command(
        subcommand,
        after_help = "Example:\n  stead template build debian\n  stead template ls"
    )]
    Template(TemplateCommand),
    /// Create a sandbox (a managed VM) from a template and start it
    #[command(after_help = "Example:\n  stead create debian --name web --memory 1G --cpus 2")]
    Create(CreateArgs),
    /// Run a command in a sandbox; its output, input and exit status are passed on
    #[command(
        after_help = "Exit status: that of CMD; 124 when it timed out, 125 when stead itself failed,\n126 and 127 when CMD could not be run or found, 128+N when signal N ended it.\n0 when it was left at its terminal with Ctrl-P Ctrl-Q: it goes on, as it does when stead ends.\n\nExample:\n  echo hello | stead exec web -- tee /root/greeting\n  stead exec -it web -- top\n  stead exec -d --key nightly web -- /root/backup.sh"
    )]
    Exec(ExecArgs),
    /// Open a login shell in a sandbox, at this terminal
    #[command(
        after_help = "Ctrl-P Ctrl-Q leaves it, and it goes on: `stead sessions ls` lists it, `stead attach` takes it up.\n\nExample:\n  stead shell web"
    )]
    Shell(ShellArgs),
    /// Listen to a command that runs in a sandbox, or has ended: what is kept of its output, then what follows
    #[command(
        after_help = "Exit status: as of `stead exec`. Whoever listened to it before is told so.\n\nExample:\n  stead attach web 3f2a"
    )]
    Attach(AttachArgs),
    /// List and signal the commands that run in a sandbox, whoever started them
    #[command(
        subcommand,
        after_help = "Example:\n  stead sessions ls web\n  stead sessions kill web 3f2a"
    )]
    Sessions(SessionsCommand),
    /// Copy files and folders into a sandbox's guest or out of it
    #[command(
        after_help = "A file appears when it is whole. Run again after an interruption, the same command goes on\nin the large file at which that ended.\n\nExample:\n  stead cp ./site web:/srv\n  stead cp web:/var/log/syslog ."
    )]
    Cp(crate::cp::CpArgs),
    /// Look at, print, write, make and remove files in a sandbox's guest
    #[command(
        subcommand,
        after_help = "Example:\n  stead file ls web:/etc\n  echo hello | stead file put web:/root/greeting"
    )]
    File(crate::cp::FileCommand),
    /// List sandboxes
    #[command(
        visible_alias = "ps",
        after_help = "Example:\n  stead ls --json | jq '.[].name'"
    )]
    Ls(LsArgs),
    /// Show one sandbox
    #[command(
        visible_alias = "inspect",
        after_help = "Example:\n  stead show web\n  stead inspect --health --json web | jq .health.state"
    )]
    Show(ShowArgs),
    /// Wait until a sandbox's guest is ready: its agent answers in time, in the epoch that it acknowledged
    #[command(after_help = "Example:\n  stead wait --ready --timeout 30 web")]
    Wait(WaitArgs),
    /// Print a sandbox's console
    #[command(
        after_help = "With --json, each line of the console is one JSON line: {\"line\":…}\n\nExample:\n  stead logs --follow web"
    )]
    Logs(LogsArgs),
    /// Shut a sandbox down; its disks stay
    #[command(after_help = "Example:\n  stead stop web")]
    Stop(StopArgs),
    /// Boot a stopped sandbox from its disks
    #[command(after_help = "Example:\n  stead start web")]
    Start(One),
    /// Remove sandboxes with their disks; checkpoints stay
    #[command(after_help = "Example:\n  stead rm --force web")]
    Rm(RmArgs),
    /// Create, list, verify and remove checkpoints
    #[command(
        subcommand,
        after_help = "Example:\n  stead checkpoint create web --name before-upgrade\n  stead checkpoint ls"
    )]
    Checkpoint(CheckpointCommand),
    /// Start new sandboxes from a checkpoint
    #[command(
        after_help = "Each gets a host name, a machine id and SSH host keys of its own before any process of it runs.\n\nExample:\n  stead fork before-upgrade -n 10\n  stead fork before-upgrade --hostname db --clear /root/.ssh"
    )]
    Fork(ForkArgs),
    /// Put a sandbox back to a checkpoint; its present state goes once the new one runs
    #[command(after_help = "Example:\n  stead restore web before-upgrade")]
    Restore(RestoreArgs),
    /// Put a sandbox's whole state into the store and stop it
    #[command(after_help = "Example:\n  stead hibernate web")]
    Hibernate(HibernateArgs),
    /// Start a hibernated sandbox where it was
    #[command(after_help = "Example:\n  stead wake web")]
    Wake(One),
    /// Save images (libvirt's format): examine, verify, change and convert them
    #[command(
        subcommand,
        after_help = "Example:\n  stead save verify /var/lib/libvirt/qemu/save/web.save"
    )]
    Save(SaveCommand),
    /// Merge the layers of a sandbox's disks that no checkpoint and no other sandbox needs; it runs on
    #[command(after_help = "Example:\n  stead compact web")]
    Compact(CompactArgs),
    /// Disk images: create, examine, convert and repair them, with the options of qemu-img
    #[command(
        disable_help_flag = true,
        after_help = "Example:\n  stead img info --output=json disk.qcow2\n\nUnder the name qemu-img this program is `stead img`."
    )]
    Img {
        /// See `stead img --help`
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "COMMAND"
        )]
        args: Vec<std::ffi::OsString>,
    },
    /// Merge layers of a disk into the one below them, with their dirty bitmaps
    #[command(
        subcommand,
        after_help = "Example:\n  stead merge plan active.qcow2 --top old.qcow2 --base base.qcow2\n  stead merge run active.qcow2 --top old.qcow2 --base base.qcow2"
    )]
    Merge(MergeCommand),
    /// Back disks up, in full or what changed, and restore them
    #[command(
        subcommand,
        after_help = "Example:\n  stead backup full disk.qcow2 --bitmap daily --to /backups/web\n  stead backup incremental disk.qcow2 --bitmap daily --to /backups/web\n  stead backup restore /backups/web latest restored.qcow2"
    )]
    Backup(BackupCommand),
    /// Set up a store, or rebuild its index
    #[command(
        subcommand,
        after_help = "Example:\n  stead store init --store s3://vm-state/prod"
    )]
    Store(StoreCommand),
    /// Check everything in the store, byte by byte
    #[command(after_help = "Example:\n  stead verify --store s3://vm-state/prod")]
    Verify,
    /// Give back the room of what no checkpoint, template or sandbox uses
    #[command(after_help = "Example:\n  stead gc --dry-run")]
    Gc(GcArgs),
    /// Say what this host offers, and what to install
    #[command(after_help = "Example:\n  stead doctor")]
    Doctor,
    /// Show the whole path on a real VM: checkpoint, ten forks on two workers, hibernate, wake, damage refused
    #[command(after_help = "Example:\n  stead demo")]
    Demo(DemoArgs),
    /// Print a completion script
    #[command(after_help = "Example:\n  stead completion bash > /etc/bash_completion.d/stead")]
    Completion {
        /// The shell to write it for
        shell: Shell,
    },
    /// Print a manual page, or write all of them into a folder
    #[command(after_help = "Example:\n  stead man checkpoint create | man -l -")]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub struct LsArgs {
    /// Also ask each guest how it is: ready, degraded or lost
    #[arg(long)]
    pub health: bool,
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Also ask the guest how it is: ready, degraded or lost, and why
    #[arg(long)]
    pub health: bool,
}

#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Until it is ready (the only thing that can be waited for)
    #[arg(long, required = true)]
    pub ready: bool,
    /// How long at most
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
}

/// A sandbox.
#[derive(Debug, Args)]
pub struct One {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
}

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Build a Debian template from apt's configured sources
    #[command(
        after_help = "Example:\n  stead template build debian --package postgresql\n  stead template build tiny --busybox --disk-size 256M"
    )]
    Build(TemplateBuildArgs),
    /// Make a template of your own disk, kernel and initramfs
    #[command(
        after_help = "The guest must run stead-agent, or exec and file system freezing are not available.\n\nExample:\n  stead template import mine --disk disk.qcow2 --kernel vmlinuz \\\n      --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda1'"
    )]
    Import(TemplateImportArgs),
    /// List templates
    #[command(after_help = "Example:\n  stead template ls")]
    Ls,
    /// Show one template
    #[command(after_help = "Example:\n  stead template show debian")]
    Show {
        /// Name, id, or the beginning of an id
        name: String,
    },
    /// Remove a template; sandboxes and checkpoints made from it stay
    #[command(after_help = "Example:\n  stead template rm debian")]
    Rm {
        /// Name, id, or the beginning of an id
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct TemplateBuildArgs {
    /// The template's name
    pub name: String,
    /// A Debian package to install besides the usual ones; repeatable
    #[arg(long = "package", value_name = "NAME")]
    pub packages: Vec<String>,
    /// Install only these packages (and what a bootable system needs)
    #[arg(long, requires = "packages")]
    pub minimal: bool,
    /// No Debian: only busybox, and the agent as process 1
    #[arg(long, conflicts_with_all = ["packages", "minimal"])]
    pub busybox: bool,
    /// Debian suite [default: the host's]
    #[arg(long)]
    pub suite: Option<String>,
    /// Size of the disk, for instance 2G
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = crate::size::parse)]
    pub disk_size: u64,
    /// The static agent to put inside [default: stead-agent beside this program]
    #[arg(long, value_name = "FILE", env = "STEAD_AGENT")]
    pub agent: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct TemplateImportArgs {
    /// The template's name
    pub name: String,
    /// The disk image, raw or qcow2
    #[arg(long, value_name = "FILE")]
    pub disk: PathBuf,
    /// The kernel (bzImage)
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: PathBuf,
    /// The kernel's command line
    #[arg(long, default_value = "console=ttyS0 root=/dev/vda rw")]
    pub cmdline: String,
}

/// Which accelerator runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// KVM if a guest really boots under it, else TCG
    Auto,
    /// The kernel's virtual machine
    Kvm,
    /// QEMU's translator
    Tcg,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name or id of the template
    pub template: String,
    /// The sandbox's name [default: its id]
    #[arg(long)]
    pub name: Option<String>,
    /// Memory, for instance 512M or 1G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = crate::size::parse)]
    pub memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cpus: u16,
    /// Size of the first disk, at least the template's [default: the template's]
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    pub disk_size: Option<u64>,
    /// One more, empty disk of this size; repeatable
    #[arg(long = "disk", value_name = "SIZE", value_parser = crate::size::parse)]
    pub disks: Vec<u64>,
    /// Accelerator
    #[arg(long, value_enum, default_value_t = Accelerator::Auto)]
    pub accelerator: Accelerator,
    /// Do not wait for the guest's agent (the template has none)
    #[arg(long)]
    pub no_agent: bool,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// An environment variable; repeatable
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// The working directory
    #[arg(long, short = 'C', value_name = "DIR")]
    pub cwd: Option<String>,
    /// The user to run as, by name or number
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,
    /// Kill the command after this time
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// Pass nothing from standard input
    #[arg(long, short = 'n', conflicts_with = "interactive")]
    pub no_stdin: bool,
    /// Pass standard input on, which is done anyhow; with -d, leave the command's input open for who attaches
    #[arg(long, short)]
    pub interactive: bool,
    /// Give the command a terminal; Ctrl-P Ctrl-Q leaves it, and it goes on
    #[arg(long, short)]
    pub tty: bool,
    /// Only start the command, and print what names it
    #[arg(long, short)]
    pub detach: bool,
    /// A name for the command: with the same one it runs once, and who asks again gets the state and the output of the first
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// A limit of a resource (as, core, cpu, data, fsize, memlock, nofile, nproc or stack), in the unit of getrlimit(2), or
    /// unlimited; repeatable
    #[arg(long = "limit", visible_alias = "ulimit", value_name = "NAME=SOFT[:HARD]", value_parser = crate::limit::parse)]
    pub limits: Vec<stead_engine::ResourceLimit>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ShellArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// The user whose shell it is, by name or number
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,
}

#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// What `stead exec -d` printed, its beginning, or the command's --key
    #[arg(value_name = "SESSION")]
    pub session: String,
    /// Pass standard input on although it is no terminal; its end is the end of the command's input
    #[arg(long, short)]
    pub interactive: bool,
    /// Pass nothing from standard input
    #[arg(long, short = 'n', conflicts_with = "interactive")]
    pub no_stdin: bool,
}

#[derive(Debug, Subcommand)]
pub enum SessionsCommand {
    /// List the commands that the sandbox's agent knows, newest first; `stead ps` lists sandboxes
    #[command(after_help = "Example:\n  stead sessions ls web --json | jq '.[].id'")]
    Ls(One),
    /// Send a signal to a command and its process group
    #[command(after_help = "Example:\n  stead sessions kill --signal TERM web 3f2a")]
    Kill(SessionsKillArgs),
}

#[derive(Debug, Args)]
pub struct SessionsKillArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// What `stead exec -d` printed, its beginning, or the command's --key
    #[arg(value_name = "SESSION")]
    pub session: String,
    /// The signal, by name or number
    #[arg(long, short, default_value = "KILL", value_parser = crate::limit::signal)]
    pub signal: i32,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Go on printing what is added
    #[arg(long, short)]
    pub follow: bool,
    /// Print only the last N lines
    #[arg(long, value_name = "N")]
    pub tail: Option<usize>,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Cut the power when the guest has not shut down by then
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// Cut the power at once
    #[arg(long, short)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct RmArgs {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "SANDBOX")]
    pub names: Vec<String>,
    /// Remove running ones too
    #[arg(long, short)]
    pub force: bool,
}

#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Capture a sandbox and publish it; the sandbox runs on
    #[command(after_help = "Example:\n  stead checkpoint create web --name before-upgrade")]
    Create(CheckpointCreateArgs),
    /// List the store's checkpoints
    #[command(after_help = "Example:\n  stead checkpoint ls")]
    Ls,
    /// Show one checkpoint: parts, sizes, lineage, what made it
    #[command(after_help = "Example:\n  stead checkpoint show before-upgrade")]
    Show(Checkpoint),
    /// Read every byte of a checkpoint and compare it with its manifest
    #[command(after_help = "Example:\n  stead checkpoint verify before-upgrade")]
    Verify(Checkpoint),
    /// Remove checkpoints; `stead gc` gives back their room
    #[command(after_help = "Example:\n  stead checkpoint rm before-upgrade")]
    Rm {
        /// Names, ids, or beginnings of ids
        #[arg(required = true, value_name = "CHECKPOINT")]
        names: Vec<String>,
        /// Also what a sandbox of another worker is hibernated in
        #[arg(long, short)]
        force: bool,
    },
}

/// A checkpoint.
#[derive(Debug, Args)]
pub struct Checkpoint {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CHECKPOINT")]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct CheckpointCreateArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub sandbox: String,
    /// The checkpoint's name
    #[arg(long)]
    pub name: Option<String>,
    /// Only the disks, with the guest's file systems frozen for the instant
    #[arg(long)]
    pub disk_only: bool,
    /// Do not ask the guest's agent: processes (or, with --disk-only, file systems) are not frozen for the instant
    #[arg(long)]
    pub crash_consistent: bool,
    /// Compact the sandbox afterwards when a disk lies in more layers than this
    #[arg(long, value_name = "LAYERS", env = "STEAD_COMPACT_ABOVE", default_value_t = stead_engine::DEPTH_COMPACTED)]
    pub compact_above: usize,
}

#[derive(Debug, Args)]
pub struct CompactArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Only say what would be merged
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct ForkArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: String,
    /// How many
    #[arg(long, short = 'n', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Name of the fork; with -n, NAME-1, NAME-2, … [default: its id]
    #[arg(long)]
    pub name: Option<String>,
    /// Leave host name, machine id and SSH host keys as they are
    #[arg(long, conflicts_with_all = ["hostname", "clear"])]
    pub keep_identity: bool,
    /// The guest's host name; with -n, NAME-1, NAME-2, … [default: the fork's name]
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Remove this file, or folder with all that is in it, in the fork before any process of it runs; repeatable
    #[arg(long, value_name = "PATH")]
    pub clear: Vec<String>,
}

#[derive(Debug, Args)]
pub struct HibernateArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Do not ask the guest's agent: processes are not frozen for the instant
    #[arg(long)]
    pub crash_consistent: bool,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// Name, id, or the beginning of an id
    #[arg(value_name = "CHECKPOINT")]
    pub checkpoint: String,
}

/// A save image.
#[derive(Debug, Args)]
pub struct SaveFile {
    /// The save image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum SaveCommand {
    /// Show what a save image is, without reading its payload
    #[command(after_help = "Example:\n  stead save info web.save")]
    Info(SaveFile),
    /// Read a save image to its end, and say what is proven, damaged, or cannot be known
    #[command(
        after_help = "Exit status: 0 when it is whole, 5 when it is damaged or incomplete.\n\nExample:\n  stead save verify web.save"
    )]
    Verify(SaveVerifyArgs),
    /// Print the domain's XML
    #[command(after_help = "Example:\n  stead save dump-xml web.save > web.xml")]
    DumpXml(SaveFile),
    /// Replace the domain's XML; the old image stands until the new one is durable
    #[command(
        after_help = "Without --xml the editor named by VISUAL or EDITOR is started, else vi.\n\nExample:\n  stead save edit-xml web.save --xml web.xml"
    )]
    EditXml(SaveEditArgs),
    /// Write a save image with another compression, or make one of a checkpoint, or a checkpoint of one
    #[command(
        after_help = "`checkpoint:NAME` names a checkpoint of the store, by name or id. No VM is run. An image made of a \
checkpoint has overlays beside it as with `stead save write`.\n\nExample:\n  stead save convert web.save web.zst.save \
--format zstd\n  stead save convert checkpoint:ready ready.save --format raw\n  stead save convert web.save checkpoint:web"
    )]
    Convert(SaveConvertArgs),
    /// Write a save image of a running sandbox, which runs on; libvirt can restore it too
    #[command(
        after_help = "Beside FILE, an overlay FILE.DISK.qcow2 is made for each disk: whoever restores the image writes to \
it. They need layers in the data directory, which stay there until FILE is gone and `stead gc` runs.\n\nExample:\n  stead save write web /backup/web.save"
    )]
    Write(SaveWriteArgs),
    /// Start a new sandbox from a save image, proven before anything runs
    #[command(after_help = "Example:\n  stead save restore /backup/web.save --name web-2")]
    Restore(SaveRestoreArgs),
    /// Write the migration stream of a save image, decompressed
    #[command(after_help = "Example:\n  stead save extract web.save web.migration")]
    Extract(SaveExtractArgs),
}

#[derive(Debug, Args)]
pub struct SaveVerifyArgs {
    /// The save image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Compare a disk's raw content with what was recorded of it; repeatable
    #[arg(long = "disk", value_name = "NAME=FILE", value_parser = disk)]
    pub disks: Vec<(String, PathBuf)>,
}

/// `vda=/path/to/raw`.
fn disk(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not of the form NAME=FILE"))?;
    Ok((name.to_owned(), PathBuf::from(file)))
}

#[derive(Debug, Args)]
pub struct SaveEditArgs {
    /// The save image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The new XML; - for standard input. Without it, an editor is started
    #[arg(long, value_name = "FILE")]
    pub xml: Option<PathBuf>,
}

/// How a payload is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SaveFormat {
    /// As it is
    Raw,
    /// gzip
    Gzip,
    /// bzip2
    Bzip2,
    /// xz
    Xz,
    /// lzop
    Lzop,
    /// zstd
    Zstd,
}

/// What a conversion reads or makes.
#[derive(Debug, Clone)]
pub enum Place {
    /// A save image.
    File(PathBuf),
    /// A checkpoint, by name or id.
    Checkpoint(String),
}

fn place(text: &str) -> Result<Place, String> {
    match text.strip_prefix("checkpoint:") {
        Some("") => Err("checkpoint: is followed by a name or id".to_owned()),
        Some(name) => Ok(Place::Checkpoint(name.to_owned())),
        None => Ok(Place::File(PathBuf::from(text))),
    }
}

#[derive(Debug, Args)]
pub struct SaveConvertArgs {
    /// The save image, or checkpoint:NAME
    #[arg(value_name = "FILE", value_parser = place)]
    pub file: Place,
    /// The new save image, which may be the same file with --force; or checkpoint:NAME
    #[arg(value_name = "TO", value_parser = place)]
    pub to: Place,
    /// How the payload of the new save image is to be stored
    #[arg(long, value_enum)]
    pub format: Option<SaveFormat>,
    /// Replace TO if it is there
    #[arg(long, short)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct SaveWriteArgs {
    /// The sandbox
    #[arg(value_name = "SANDBOX")]
    pub name: String,
    /// The new save image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How the payload is to be stored
    #[arg(long, value_enum, default_value = "raw")]
    pub format: SaveFormat,
    /// End the VM when the image is complete
    #[arg(long)]
    pub stop: bool,
}

#[derive(Debug, Args)]
pub struct SaveRestoreArgs {
    /// The save image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name of the new sandbox
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct SaveExtractArgs {
    /// The save image
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Where to write the stream; - for standard output
    #[arg(value_name = "TO")]
    pub to: PathBuf,
    /// Replace TO if it is there
    #[arg(long, short)]
    pub force: bool,
}

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Make the folder or bucket prefix named by --store a store
    #[command(after_help = "Example:\n  stead store init --store s3://vm-state/prod")]
    Init,
    /// Write the store's index anew from the packs themselves; checkpoints are not changed
    #[command(after_help = "Example:\n  stead store rebuild-index")]
    RebuildIndex,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// The command whose page is wanted [default: the page of stead itself]
    #[arg(value_name = "COMMAND", conflicts_with = "to")]
    pub command: Vec<String>,
    /// Write the pages of all commands into this folder, which must be there
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct GcArgs {
    /// Only say what would go
    #[arg(long)]
    pub dry_run: bool,
    /// Forget the lease of a publisher that is gone for good (`stead gc` names them)
    #[arg(long, value_name = "LEASE")]
    pub break_lease: Vec<String>,
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Template to use; it is built if absent
    #[arg(long, default_value = "debian")]
    pub template: String,
    /// How many forks, half of them on each worker
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(2..=100))]
    pub forks: u32,
    /// Leave workers, store and VMs as they are at the end
    #[arg(long)]
    pub keep: bool,
}

#[derive(Debug, Subcommand)]
pub enum MergeCommand {
    /// Say what a merge would do: layers, bitmaps, the exact room, and why it is refused
    #[command(
        after_help = "The exit status is 0 when the merge can be run, else that of the first refusal.\n\nExample:\n  stead merge plan --json active.qcow2 --top old.qcow2 --base base.qcow2 | jq .space"
    )]
    Plan(MergeArgs),
    /// Merge: all of it or nothing; read back before a layer is removed
    #[command(
        after_help = "The disk must not be in use, but by the VM of --qmp. After a crash, `stead merge recover BASE` finishes or undoes it.\n\nExample:\n  stead merge run active.qcow2 --top old.qcow2 --base /dev/vg/base \\\n      --extend-cmd 'f() { lvextend -L \"${2}b\" \"$1\"; }; f'"
    )]
    Run(MergeArgs),
    /// Finish or undo a merge that was interrupted
    #[command(after_help = "Example:\n  stead merge recover base.qcow2")]
    Recover(MergeRecoverArgs),
}

/// What becomes of bitmaps of the base that no layer above has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stale {
    /// They are removed: no backup can rely on them
    Prune,
    /// They stay, with all that the merge changes marked
    Keep,
    /// The merge is refused
    Refuse,
}

#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The disk's active layer; those below are found by the names in the images
    #[arg(value_name = "CHAIN")]
    pub chain: PathBuf,
    /// The topmost layer that is merged: a file, or a number as `plan` shows it [default: the active layer]
    #[arg(long, value_name = "LAYER")]
    pub top: Option<PathBuf>,
    /// The layer that is merged into [default: the one below the top]
    #[arg(long, value_name = "LAYER")]
    pub base: Option<PathBuf>,
    /// What becomes of bitmaps of the base that no layer above has
    #[arg(long, value_enum, default_value_t = Stale::Prune)]
    pub stale: Stale,
    /// Do not remove merged layers
    #[arg(long)]
    pub keep_layers: bool,
    /// Cut a base that is longer than what the chain shows
    #[arg(long)]
    pub cut_base: bool,
    /// Go on although bitmaps are lost that a backup could rely on
    #[arg(long)]
    pub drop_bitmaps: bool,
    /// Look for other children in this folder, too; repeatable
    #[arg(long, value_name = "DIR")]
    pub look_in: Vec<PathBuf>,
    /// An image that may stand on what is merged; repeatable
    #[arg(long = "sibling", value_name = "FILE")]
    pub siblings: Vec<PathBuf>,
    /// Shell command that extends a device that is too short; it gets the device and the bytes it must have
    #[arg(long, value_name = "CMD")]
    pub extend_cmd: Option<String>,
    /// The control socket of the QEMU that runs on this disk: it does the merge, and the guest runs on
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// The most that a merge under a running VM moves in a second, for instance 50M
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse, requires = "qmp")]
    pub speed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct MergeRecoverArgs {
    /// The base, another layer of the chain, or a folder
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Back up the whole disk, and begin a bitmap of what changes from then on
    #[command(
        after_help = "An image must not be in use. All disks of a running sandbox are taken at one instant, its file systems frozen; it runs on.\n\nExample:\n  stead backup full disk.qcow2 --bitmap daily --to /backups/web\n  stead backup full web --bitmap daily --to /backups/web\n  stead backup full disk.qcow2 --qmp /run/vm/qmp --bitmap daily --to s3://backups/web"
    )]
    Full(BackupFullArgs),
    /// Back up what changed since the last backup in the folder or store
    #[command(
        after_help = "Where a disk's bitmap or the backup that it began with cannot be relied on,\na full backup of that disk is made and the reason is said.\n\nExample:\n  stead backup incremental disk.qcow2 --bitmap daily --to /backups/web --no-fallback"
    )]
    Incremental(BackupIncrementalArgs),
    /// Make the disk of a backup again; it appears when every MiB of it has the recorded hash
    #[command(
        after_help = "Example:\n  stead backup restore /backups/web latest restored.qcow2\n  stead backup restore /backups/web 3f2a restored.raw --format raw"
    )]
    Restore(BackupRestoreArgs),
    /// Read backups whole and say what is damaged
    #[command(
        after_help = "The exit status is 5 when something is damaged.\n\nExample:\n  stead backup verify /backups/web\n  stead backup verify /backups/web 3f2a"
    )]
    Verify(BackupVerifyArgs),
    /// List the backups in a folder or a store
    #[command(after_help = "Example:\n  stead backup ls /backups/web --json | jq '.[].id'")]
    Ls(BackupLsArgs),
    /// Remove a backup that no other stands on
    #[command(
        after_help = "In a store no backup stands on another; `stead gc` gives back the room.\n\nExample:\n  stead backup rm /backups/web 3f2a"
    )]
    Rm(BackupRmArgs),
}

#[derive(Debug, Args)]
pub struct BackupArgs {
    /// A disk's active layer, a qcow2 image (those below are found by the names in the images); or a sandbox, running
    /// or not, with all its disks (SANDBOX) or one of them (SANDBOX:DISK)
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
    /// Name of the bitmaps; each gets the id of the backup that it begins with behind it (NAME@ID)
    #[arg(long, value_name = "NAME")]
    pub bitmap: String,
    /// Folder of backups, which is made if it is not there; or a store: its URL, or a folder that is one
    #[arg(long, value_name = "DIR|STORE")]
    pub to: PathBuf,
    /// QMP socket of the VM that runs on DISK, where that is not a sandbox: its disk is backed up while it runs
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// Folder with room for a copy of what is backed up with --qmp, meanwhile [default: that of the backups; for a store the
    /// data directory]
    #[arg(long, value_name = "DIR", requires = "qmp")]
    pub staging: Option<PathBuf>,
    /// Do not compress a full backup
    #[arg(long)]
    pub no_compress: bool,
}

#[derive(Debug, Args)]
pub struct BackupFullArgs {
    #[command(flatten)]
    pub common: BackupArgs,
}

#[derive(Debug, Args)]
pub struct BackupIncrementalArgs {
    #[command(flatten)]
    pub common: BackupArgs,
    /// Refuse where only a full backup can be made
    #[arg(long)]
    pub no_fallback: bool,
}

/// The format of a restored disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiskFormat {
    /// A qcow2 image of its own
    Qcow2,
    /// The bytes of the disk
    Raw,
}

#[derive(Debug, Args)]
pub struct BackupRestoreArgs {
    /// Folder of backups, or a store
    #[arg(value_name = "DIR|STORE")]
    pub from: PathBuf,
    /// The beginning of a backup's id, or `latest`
    #[arg(value_name = "BACKUP")]
    pub backup: String,
    /// Where the disk is to be
    #[arg(value_name = "TARGET")]
    pub to: PathBuf,
    /// Format of the restored disk
    #[arg(long, value_enum, default_value_t = DiskFormat::Qcow2)]
    pub format: DiskFormat,
    /// Replace TARGET if it is there, once the disk is proven
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct BackupVerifyArgs {
    /// Folder of backups, or a store
    #[arg(value_name = "DIR|STORE")]
    pub folder: PathBuf,
    /// The beginning of a backup's id, or `latest`; those that it stands on are read, too [default: all]
    #[arg(value_name = "BACKUP")]
    pub backup: Option<String>,
}

#[derive(Debug, Args)]
pub struct BackupLsArgs {
    /// Folder of backups, or a store
    #[arg(value_name = "DIR|STORE")]
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
pub struct BackupRmArgs {
    /// Folder of backups, or a store
    #[arg(value_name = "DIR|STORE")]
    pub folder: PathBuf,
    /// The beginning of a backup's id, or `latest`
    #[arg(value_name = "BACKUP")]
    pub backup: String,
}

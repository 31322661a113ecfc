//! `freetumor bench`: what parts of the program cost on this machine.

mod nn;
mod sampler;
mod serve;
mod store;

use std::process::ExitCode;

use clap::Subcommand;

/// Measure what parts of the program cost on this machine
///
/// Example: freetumor bench nn --rounds 5
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Nn(nn::Args),
    Store(store::Args),
    Sampler(sampler::Args),
    Serve(serve::Args),
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.what {
        What::Nn(args) => nn::run(args),
        What::Store(args) => store::run(args),
        What::Sampler(args) => sampler::run(args),
        What::Serve(args) => serve::run(args),
    }
}

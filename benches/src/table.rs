//! Samples, their medians, and the table.

use std::fmt;

/// One run: milliseconds, and KiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    pub dump: f64,
    pub restore: f64,
    pub gap: f64,
    /// From the start of the restore to the program's first step.
    pub first: f64,
    /// Of the images, KiB.
    pub size: u64,
    pub dump_rss: u64,
    pub restore_rss: u64,
}

const MARK: &str = "sample:";

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dump, restore, gap, first, size, dump_rss, restore_rss } = self;
        write!(f, "{MARK} {dump} {restore} {gap} {first} {size} {dump_rss} {restore_rss}")
    }
}

impl Sample {
    /// The sample that one line of the text holds.
    pub fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix(MARK))?;
        let numbers: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [dump, restore, gap, first, size, dump_rss, restore_rss] = numbers[..] else { return None };
        let [size, dump_rss, restore_rss] = [size, dump_rss, restore_rss].map(|number| number as u64);
        Some(Self { dump, restore, gap, first, size, dump_rss, restore_rss })
    }
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> Option<f64> {
    let mut all: Vec<f64> = samples.iter().map(of).collect();
    all.sort_by(f64::total_cmp);
    let middle = all.len() / 2;
    match all.len() {
        0 => None,
        length if length % 2 == 1 => Some(all[middle]),
        _ => Some(f64::midpoint(all[middle - 1], all[middle])),
    }
}

/// The title line. The ratios are of the first tool over the others: above 1 the other is faster, or smaller; except for
/// speeds.
pub fn head(names: &[&str]) -> String {
    let mut title = "| case | measure |".to_owned();
    let mut line = "|---|---|".to_owned();
    for name in names {
        title += &format!(" {name} |");
        line += "---:|";
    }
    for name in names.iter().skip(1) {
        title += &format!(" {} / {name} |", names[0]);
        line += "---:|";
    }
    format!("{title}\n{line}\n")
}

/// Name, unit and place in the sample of one line of the table.
type Measure = (&'static str, fn(&Sample) -> f64);

/// The lines of one case.
pub fn rows(case: &str, names: &[&str], samples: &[Vec<Sample>]) -> String {
    let speeds: [Measure; 2] = [
        ("dump, MiB/s", |s| s.size as f64 / 1.024 / s.dump),
        ("restore, MiB/s", |s| s.size as f64 / 1.024 / s.restore),
    ];
    let measures: [Measure; 7] = [
        ("dump, ms", |s| s.dump),
        ("restore, ms", |s| s.restore),
        ("longest gap, ms", |s| s.gap),
        ("first step after the start of a restore, ms", |s| s.first),
        ("size of the images, MiB", |s| s.size as f64 / 1024.0),
        ("peak memory of dump, MiB", |s| s.dump_rss as f64 / 1024.0),
        ("peak memory of restore, MiB", |s| s.restore_rss as f64 / 1024.0),
    ];
    let mut text = String::new();
    // Where the images of one tool are as large as those of another.
    let has_speed = ["mem-", "thp-", "redis-", "postgres-"].iter().any(|kind| case.starts_with(kind));
    let speeds = speeds.into_iter().filter(|_| has_speed);
    for (title, of) in measures.into_iter().chain(speeds) {
        let medians: Vec<Option<f64>> = samples.iter().map(|samples| median(samples, of)).collect();
        text += &format!("| {case} | {title} |");
        for value in &medians {
            text += &value.map_or(" failed |".to_owned(), |value| format!(" {value:.1} |"));
        }
        for (value, _) in medians.iter().zip(names).skip(1) {
            text += &match (medians[0], value) {
                (Some(first), Some(value)) if *value > 0.0 => format!(" {:.2} |", first / value),
                _ => " – |".to_owned(),
            };
        }
        text += "\n";
    }
    text
}

//! Crashes at every block write: small workloads with a name, each of them crashed everywhere.

mod engine;
mod judge;
mod run;
mod sabotage;
mod workloads;

use engine::crash_at_every_write;

macro_rules! crash_at_every_write_of {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                both_sizes(workloads::$name);
            }
        )*
    };
}

/// With small and with large blocks, unless the workload is for one of them only.
fn both_sizes(workload: fn(u32) -> engine::Workload) {
    for bsize in [512, 4096] {
        let w = workload(bsize);
        if w.bsize == bsize {
            crash_at_every_write(&w);
        }
    }
}

crash_at_every_write_of!(
    create,
    create_write_fsync,
    write_without_fsync,
    overwrite_in_place,
    append_small_pieces,
    tree_grows_in_height,
    holes_filled_in_the_middle,
    truncate_to_nothing,
    truncate_in_the_middle_of_the_tree,
    truncate_up,
    truncate_down_and_up,
    punch_holes,
    allocate_ahead,
    sync_writes,
    fdatasync_of_size_and_of_bytes,
    write_new_and_rename_over,
    journaled_data,
    unlink,
    unlink_while_open,
    orphans_swept,
    hard_links,
    symbolic_links,
    device_nodes,
    make_and_remove_directories,
    attributes,
    rename_in_a_directory,
    rename_across_directories,
    rename_over_a_target,
    rename_noreplace,
    rename_exchange,
    directory_becomes_hashed,
    leaf_splits,
    hash_table_doubles,
    chain_of_leaves,
    directory_emptied_and_removed,
    freed_metadata_becomes_data,
    indirect_blocks_freed_and_reused,
    free_and_allocate_again,
    totals_change,
    many_files_in_several_groups,
    big_file_over_several_groups,
    journal_wraps,
    one_large_flush,
    sync_of_one_file_orders_all_names,
);

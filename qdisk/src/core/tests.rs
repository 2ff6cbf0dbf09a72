mod directed;
mod sim;
